"""Building, packing and planning tries on one CPU core; every time stands beside a right answer.

    pytest benchmarks/bench_trie.py      writes benchmarks/results/trie-cpu.json

sft_24k is one fork/join trajectory of 5 blocks x 4 threads, grpo_N a batch of N rollouts in groups of 8 that share a
prompt (one trie a group), grpo_1024_one_trie the whole batch in one trie. "python_dicts" inserts token by token into
nested dicts, as short code does, and counts no targets. Medians; a batch's tries are all kept until its clock stops.
first_mtokens_per_s is the first run after the inputs were made, whose memory the system still has to map.
"""

import tracemalloc
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.attention_inputs import sft_64k
from tests.support.sequences import grpo_groups, lognormal_sizes, sft_24k

from tw_core import PackedTrie, ReasoningTrie, masks, pack_forest

pytestmark = pytest.mark.usefixtures("one_core")
Figures = list[dict[str, Any]]
BUDGET = 8_192


def keep(figures: Figures, case: str, impl: str, metric: str, value: float, unit: str) -> None:
    figures.append({"case": case, "impl": impl, "metric": metric, "value": round(float(value), 4), "unit": unit})


def median_ms(benchmark: Any, function: Callable[..., Any], *args: Any, rounds: int = 20) -> float:
    benchmark.pedantic(function, args, rounds=rounds, iterations=1, warmup_rounds=2)
    return float(benchmark.stats.stats.median) * 1e3


def build_and_pack(units: Any) -> PackedTrie:
    return ReasoningTrie.from_units(units).pack()


def python_dicts(units: Any) -> tuple[list[int], list[int], list[int], list[int]]:
    """input_ids, position_ids, parent and subtree_end, token by token."""
    root: dict[int, Any] = {}
    for context, completion in units:
        node = root
        for token in [*context.tolist(), *completion.tolist()]:
            node = node.setdefault(token, {})
    ids: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    stack = [(token, node, 0, -1) for token, node in reversed(root.items())]
    waiting: list[int] = []
    while stack:
        token, node, depth, parent = stack.pop()
        row = len(ids)
        while waiting and depths[waiting[-1]] >= depth:
            ends[waiting.pop()] = row
        waiting.append(row)
        ids.append(token)
        depths.append(depth)
        parents.append(parent)
        ends.append(-1)
        stack.extend((token, below, depth + 1, row) for token, below in reversed(node.items()))
    for row in waiting:
        ends[row] = len(ids)
    return ids, depths, parents, ends


@pytest.mark.benchmark(group="trie-sft")
@pytest.mark.parametrize("impl", ["tw_core", "python_dicts"])
def bench_sft_trajectory(benchmark: Any, figures: Figures, impl: str) -> None:
    units = sft_24k()
    function: Callable[..., Any] = {"tw_core": build_and_pack, "python_dicts": python_dicts}[impl]
    build_ms = median_ms(benchmark, function, units)
    packed, slow = build_and_pack(units), python_dicts(units)
    rows = (packed.input_ids, packed.position_ids, packed.parent, packed.subtree_end)
    for found, expected in zip(rows, slow, strict=True):
        assert found.tolist() == expected
    assert int(packed.target_weights.sum()) == sum(completion.size for _, completion in units)
    tracemalloc.start()
    function(units)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    keep(figures, "sft_24k", impl, "build_pack_ms", build_ms, "ms")
    keep(figures, "sft_24k", impl, "peak_mib", peak, "MiB")
    if impl == "tw_core":
        assert peak <= 20
        keep(figures, "sft_24k", impl, "rows", packed.num_rows, "rows")
        keep(figures, "sft_24k", impl, "expanded_tokens", packed.num_expanded_tokens, "tokens")
        keep(figures, "sft_24k", impl, "sharing_ratio", packed.sharing_ratio, "ratio")


@pytest.mark.benchmark(group="trie-grpo")
@pytest.mark.parametrize("case", ["grpo_128", "grpo_256", "grpo_512", "grpo_1024", "grpo_1024_one_trie"])
def bench_grpo_batch(benchmark: Any, figures: Figures, case: str) -> None:
    groups = grpo_groups(int(case.split("_")[1]))
    if case.endswith("one_trie"):
        groups = [[unit for group in groups for unit in group]]
    expanded = sum(context.size + completion.size for group in groups for context, completion in group)

    def build_all() -> list[PackedTrie]:
        return [build_and_pack(group) for group in groups]

    started = perf_counter()
    packed = build_all()
    first_ms = (perf_counter() - started) * 1e3
    milliseconds = median_ms(benchmark, build_all, rounds=11)
    assert sum(row.num_expanded_tokens for row in packed) == expanded
    context, completion = groups[-1][-1]
    torch.testing.assert_close(packed[-1].sequences()[-1].numpy(), np.concatenate([context, completion]))
    keep(figures, case, "tw_core", "build_pack_ms", milliseconds, "ms")
    keep(figures, case, "tw_core", "expanded_tokens", expanded, "tokens")
    keep(figures, case, "tw_core", "mtokens_per_s", expanded / milliseconds / 1e3, "million tokens/s")
    keep(figures, case, "tw_core", "first_mtokens_per_s", expanded / first_ms / 1e3, "million tokens/s")


@pytest.mark.benchmark(group="trie-forest")
def bench_pack_forest(benchmark: Any, figures: Figures) -> None:
    sizes = lognormal_sizes(10_000, seed=0, largest=BUDGET)
    rng = np.random.default_rng(0)
    tries = [ReasoningTrie.from_sequences([rng.integers(0, 1_000, size)]) for size in sizes]
    milliseconds = median_ms(benchmark, pack_forest, tries, BUDGET, rounds=5)
    forests = pack_forest(tries, BUDGET)
    assert sum(forest.num_rows for forest in forests) == sizes.sum()
    fill = sizes.sum() / (len(forests) * BUDGET)
    assert fill >= 0.97
    keep(figures, "lognormal_10k", "tw_core", "pack_forest_ms", milliseconds, "ms")
    keep(figures, "lognormal_10k", "tw_core", "fill", fill, "share")


@pytest.mark.benchmark(group="trie-masks")
@pytest.mark.parametrize("what", ["block_bounds", "block_mask", "subtree_end_from_depth", "check_forest"])
def bench_masks(benchmark: Any, figures: Figures, what: str) -> None:
    """Two trajectories of 32k rows side by side: 64,556 rows, blocks of 128."""
    row = sft_64k()
    calls: dict[str, Callable[[], Any]] = {
        "block_bounds": lambda: masks.block_bounds(row.subtree_end, 128),
        "block_mask": lambda: masks.block_mask(row.subtree_end, 128),
        "subtree_end_from_depth": lambda: masks.subtree_end_from_depth(row.depth),
        "check_forest": lambda: masks.check_forest(row.subtree_end, row.depth),
    }
    keep(figures, "sft_64k", "tw_core", f"{what}_ms", median_ms(benchmark, calls[what]), "ms")
    if what == "block_bounds":
        low, high = calls[what]()
        assert low.tolist() == [int(block.min()) for block in row.subtree_end.split(128)]
        assert high.tolist() == [int(block.max()) for block in row.subtree_end.split(128)]
    elif what == "subtree_end_from_depth":
        assert torch.equal(calls[what](), row.subtree_end)
