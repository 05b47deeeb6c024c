"""A training step on packed tries beside one on expanded sequences: loss curves, time, memory, sharing efficiency.

    python -m benchmarks.bench_sft --out DIR          Qwen3-0.6B and 4B shapes, random weights, bfloat16, one GPU
    python -m benchmarks.bench_sft --tiny --out DIR   the same code on a CPU (its test)

Both runs start from the same weights and take the same fork/join samples in the same order, one sample a step, with
activation checkpointing, TRL's fused head and AdamW. "trie": one packed row through impl="auto" (meta says which that
was). "expanded": its units one after another, padding-free, through varlen flash attention, in as few rows as fit
`--row-budget`. Each run is warmed up on the first sample before its clock starts; step_ms is the median over the steps.

The JSON is written after every step. `--merge FILE --reuse` goes on from an interrupted run: a kind that FILE holds to
its last step is not run again, one that was cut starts anew.

flop_ratio counts the linear layers by tokens and attention by visible pairs, expanded over trie; the head runs on
trained tokens alone and costs both the same. sharing_efficiency = speedup / flop_ratio, speedup the ratio of the median
steps; these ratios and loss_max_relative_difference are over the steps that both runs have taken (steps_compared).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks.attention_runs import auto_choice
from benchmarks.records import command_line, device_slug, merge_records, read_results, write_records
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tw_core import PackedTrie, ReasoningTrie, Unit
from tw_recipes.attention import install, uninstall
from tw_recipes.sft.collator import TrieCollator, packed_columns


class Case(NamedTuple):
    """One model shape and how long it is run."""

    config: dict[str, Any]
    steps: int
    learning_rate: float
    scale: float  # of the lengths of a sample


_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
CASES = {
    "qwen3_0.6b": Case(
        {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        steps=50,
        learning_rate=2e-4,
        scale=0.75,
    ),
    "qwen3_4b": Case(
        {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        steps=50,
        learning_rate=5e-5,
        scale=1.0,
    ),
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
MEASURED = ("loss_step", "ms_step", "peak_mib")
TINY = Case(
    {
        **_QWEN3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "head_dim": 8,
        "vocab_size": 512,
    },
    steps=4,
    learning_rate=1e-3,
    scale=0.02,
)


def sample_units(rng: np.random.Generator, vocab: int, scale: float) -> list[Unit]:
    """Units of one fork/join trajectory: 3 to 4 blocks of 2 to 5 threads; tokens from a skewed distribution."""

    def tokens(mean: float) -> list[int]:
        count = max(2, int(scale * mean * rng.uniform(0.6, 1.4)))
        return (rng.zipf(1.3, count) % (vocab // 64)).tolist()

    context, units = tokens(300), []
    for _ in range(rng.integers(3, 5)):
        opening = tokens(500)
        units.append(Unit(context, opening))
        context = context + opening
        bodies = [(tokens(8), tokens(600)) for _ in range(rng.integers(2, 6))]
        units += [Unit(context + header, body) for header, body in bodies]
        context = context + [token for header, body in bodies for token in header + body]
    units.append(Unit(context, tokens(700)))
    return units


def expanded_batches(units: list[Unit], row_budget: int) -> list[dict[str, Any]]:
    """The units as chains, padding-free, in rows of at most `row_budget` tokens."""
    bins: list[list[PackedTrie]] = [[]]
    for unit in units:
        chain = ReasoningTrie.from_units([unit]).pack()
        if bins[-1] and sum(part.num_rows for part in bins[-1]) + chain.num_rows > row_budget:
            bins.append([])
        bins[-1].append(chain)
    return [TrieCollator()([packed_columns(PackedTrie.concat(parts))]) for parts in bins]


def forward_flops(config: dict[str, Any], depth_sum: int, rows: int) -> float:
    """Forward FLOPs of the layers: linear by rows, attention by visible pairs (`depth_sum`)."""
    hidden, heads, dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    weights = hidden * dim * (2 * heads + 2 * config["num_key_value_heads"]) + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * (2.0 * weights * rows + 4.0 * heads * dim * depth_sum)


def build(case: Case, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The model with random weights, the same for each call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**case.config, max_position_embeddings=65536)).to(dtype)
    add_fused_lm_head(model, outputs=("log_probs",))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def train(
    model: Qwen3ForCausalLM, steps: list[list[dict[str, Any]]], learning_rate: float, device: torch.device
) -> Iterator[tuple[float, float]]:
    """Loss (mean over trained tokens) and seconds of each step, as it ends; a step is a list of micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=device.type == "cuda")

    def step(batches: list[dict[str, Any]]) -> float:
        count = sum(batch["labels"].numel() for batch in batches)
        total = torch.zeros((), device=device)
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = -model(**on_device, fused_lm_head=True).log_probs.sum() / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return float(total)

    step(steps[0])  # compile and allocate; its gradients are dropped
    optimizer.zero_grad()
    for batches in steps:
        start = time.perf_counter()
        loss = step(batches)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield loss, time.perf_counter() - start


class Work(NamedTuple):
    """What the steps of one kind compute: one entry a step."""

    batches: list[list[dict[str, Any]]]
    rows: np.ndarray
    flops: np.ndarray


def prepare(case: Case, row_budget: int) -> tuple[list[PackedTrie], dict[str, Work]]:
    """The samples, packed, and both kinds' batches of them."""
    rng = np.random.default_rng(0)
    samples = [sample_units(rng, case.config["vocab_size"], case.scale) for _ in range(case.steps)]
    packed = [ReasoningTrie.from_units(units).pack() for units in samples]
    batches = {
        "trie": [[TrieCollator()([packed_columns(trie)])] for trie in packed],
        "expanded": [expanded_batches(units, row_budget) for units in samples],
    }

    def work(steps: list[list[dict[str, Any]]]) -> Work:
        rows = [sum(batch["input_ids"].numel() for batch in step) for step in steps]
        depths = [sum(int((batch["position_ids"] + 1).sum()) for batch in step) for step in steps]
        flops = [forward_flops(case.config, *counts) for counts in zip(depths, rows, strict=True)]
        return Work(steps, np.array(rows), np.array(flops))

    return packed, {impl: work(steps) for impl, steps in batches.items()}


def run_case(
    name: str, case: Case, impls: dict[str, str], device: torch.device, row_budget: int, kept: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """All records of one model so far, after every step; a kind that `kept` holds whole is taken from there."""
    packed, work = prepare(case, row_budget)
    measured: list[dict[str, Any]] = []
    for impl, kind in work.items():
        own = [r for r in kept if (r["case"], r["impl"]) == (name, impl) and r["metric"].startswith(MEASURED)]
        if len(curve(own, name, impl, "loss")) == len(curve(own, name, impl, "ms")) == case.steps:
            measured += own
            yield measured + summary(name, measured, packed, work)
            continue
        model = build(case, device, DTYPES[device.type])
        install(model, impl=impls[impl])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step, (loss, seconds) in enumerate(train(model, kind.batches, case.learning_rate, device)):
            measured.append(record(name, impl, f"loss_step_{step:03d}", loss, "nats"))
            measured.append(record(name, impl, f"ms_step_{step:03d}", 1e3 * seconds, "ms"))
            if device.type == "cuda":
                measured = [r for r in measured if (r["impl"], r["metric"]) != (impl, "peak_mib")]
                measured.append(record(name, impl, "peak_mib", torch.cuda.max_memory_allocated() / 2**20, "MiB"))
            yield measured + summary(name, measured, packed, work)
        uninstall(model)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def record(case: str, impl: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "impl": impl, "metric": metric, "value": round(float(value), 6), "unit": unit}


def curve(records: list[dict[str, Any]], case: str, impl: str, of: str = "loss") -> np.ndarray:
    """Loss ("loss") or time ("ms") of each step, shape (steps,)."""
    return np.array(
        [r["value"] for r in records if (r["case"], r["impl"]) == (case, impl) and r["metric"].startswith(f"{of}_step")]
    )


def summary(
    name: str, measured: list[dict[str, Any]], packed: list[PackedTrie], work: dict[str, Work]
) -> list[dict[str, Any]]:
    """What follows from the steps taken so far."""
    records = []
    times = {impl: curve(measured, name, impl, "ms") for impl in work}
    logical = np.array([trie.num_expanded_tokens for trie in packed])
    for impl, ms in times.items():
        done = len(ms)
        if done:
            records.append(record(name, impl, "step_ms", np.median(ms), "ms"))
            records.append(record(name, impl, "rows_per_step", work[impl].rows[:done].mean(), "rows"))
            rate = 1e3 * logical[:done].sum() / ms.sum()
            records.append(record(name, impl, "logical_tokens_per_s", rate, "tokens/s"))
    both = min(len(ms) for ms in times.values())
    if both:
        speedup = np.median(times["expanded"][:both]) / np.median(times["trie"][:both])
        flop_ratio = work["expanded"].flops[:both].sum() / work["trie"].flops[:both].sum()
        losses = {impl: curve(measured, name, impl)[:both] for impl in work}
        figures = {
            "steps_compared": both,
            "sharing_ratio": logical[:both].sum() / work["trie"].rows[:both].sum(),
            "flop_ratio": flop_ratio,
            "speedup": speedup,
            "sharing_efficiency": speedup / flop_ratio,
            "loss_max_relative_difference": np.max(np.abs(losses["trie"] / losses["expanded"] - 1)),
        }
        records += [record(name, "trie", metric, value, "") for metric, value in figures.items()]
    return records


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Loss curves of both runs, one panel a model, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["case"] for r in records if r["metric"] == "loss_max_relative_difference"))
    if not names:
        return
    figure, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 5), squeeze=False, height_ratios=(3, 1))
    for column, name in enumerate(names):
        curves = {impl: curve(records, name, impl) for impl in ("trie", "expanded")}
        both = min(len(losses) for losses in curves.values())
        for impl, style in (("expanded", "-"), ("trie", "--")):
            axes[0][column].plot(curves[impl], style, label=impl)
        axes[0][column].set(title=name, ylabel="loss (nats per token)")
        axes[0][column].legend()
        axes[1][column].plot(100 * (curves["trie"][:both] / curves["expanded"][:both] - 1), color="gray")
        axes[1][column].axhline(0, color="black", linewidth=0.5)
        axes[1][column].set(xlabel="step", ylabel="difference (%)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> int:
    """Run the cases, write DIR/sft-<device>.json after each step, and plot the loss curves, cut or not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--steps", type=int, help="optimizer steps of every case")
    parser.add_argument("--row-budget", type=int, default=65536, help="tokens of one expanded row")
    parser.add_argument("--impl", default="auto", help="implementation of the trie run")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--merge", type=read_results, help="results file to add to: other (case, impl) pairs are kept")
    parser.add_argument("--reuse", action="store_true", help="with --merge: do not run again what it holds whole")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    cases = {"tiny": TINY} if args.tiny else {name: CASES[name] for name in args.cases.split(",")}
    if args.steps:
        cases = {name: case._replace(steps=args.steps) for name, case in cases.items()}
    device = torch.device("cpu" if args.tiny else "cuda")
    label, command = device_slug(device.type), command_line("bench_sft", words)
    kept = args.merge["records"] if args.merge and args.reuse else []
    finished: list[dict[str, Any]] = []
    so_far: list[dict[str, Any]] = []
    try:
        for name, case in cases.items():
            used = args.impl if args.impl != "auto" else auto_choice(case.config, device, DTYPES[device.type])
            impls, notes = {"trie": args.impl, "expanded": "varlen"}, {"trie_attention": used}
            for so_far in run_case(name, case, impls, device, args.row_budget, kept):
                write_records(
                    *(args.out / f"sft-{label}.json", finished + so_far),
                    **{"command": command, "seed": 0, "device": device.type, "merge": args.merge, "notes": notes},
                )
            finished, so_far = finished + so_far, []
            for r in finished:
                if r["case"] == name and "_step_" not in r["metric"]:
                    print(f"{name} {r['impl']} {r['metric']} {r['value']:.5g} {r['unit']}", flush=True)
    finally:
        plot(merge_records(args.merge, finished + so_far), args.out / f"sft_loss-{label}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
