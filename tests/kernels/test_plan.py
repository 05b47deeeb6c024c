"""The block plan: right for every tile, the same from torch and from Triton, never stale."""

import gc
import time
from statistics import median

import pytest
import torch

from tests.support.attention_inputs import (
    Node,
    TrieShape,
    build,
    chain,
    comb,
    every_offset,
    random_forest,
    sft_64k,
    small_tries,
)
from tw_core.errors import ShapeError
from tw_core.masks import dense_mask
from tw_kernels.trie_attention import memo
from tw_kernels.trie_attention.plan import BlockPlan, cached_plan, make_plan

# A long branch that ends at each row about the end of a block: the last rows decide whether a tile is full.
SEAMS = [build(f"seam{length}", [Node(length), Node(30)]) for length in range(45, 51)]
TRIES = [*small_tries(), every_offset(), chain(128), random_forest(3, 300), comb(30, 2, 5), *SEAMS]
WINDOWS = [None, 1, 7, 40]


def seen_pairs(trie: TrieShape, window: int | None) -> torch.Tensor:
    seen = dense_mask(trie.subtree_end)
    if window is not None:
        seen = seen & (trie.depth[:, None] - trie.depth[None, :] < window)
    return seen


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("trie", TRIES, ids=str)
def test_every_tile_is_what_the_plan_says(trie: TrieShape, window: int | None) -> None:
    block = 16
    plan = make_plan(trie.subtree_end, depth=trie.depth, window=window, block=block)
    seen = seen_pairs(trie, window)
    met, skippable = 0, 0
    for i, (partial, full) in enumerate(plan.tiles()):
        assert partial == sorted(set(partial))
        assert full == sorted(set(full))
        assert partial[-1] == i, "the diagonal comes last in the list and first in the kernels"
        for j in range(plan.num_blocks):
            tile = seen[i * block : (i + 1) * block, j * block : (j + 1) * block]
            if j in full:
                assert j < i
                assert j not in partial
                assert tile.all()
            elif j in partial:
                met += 1
                skippable += not tile.any()
            else:
                assert not tile.any()
            if window is None:  # the bounds are then exact
                assert (j in full) == (j < i and bool(tile.all()))
                assert (j in full or j in partial) == bool(tile.any())
    assert window is not None or skippable == 0
    assert met >= plan.num_blocks


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("trie", TRIES, ids=str)
def test_the_transpose_lists_the_same_tiles(trie: TrieShape, window: int | None) -> None:
    plan = make_plan(trie.subtree_end, window=window, block=16)
    for kind in (0, 1):
        by_query = {(i, j) for i, lists in enumerate(plan.tiles()) for j in lists[kind]}
        by_key = {(i, j) for j, lists in enumerate(plan.tiles(by_key=True)) for i in lists[kind]}
        assert by_query == by_key
    for by_key in (False, True):
        counts = [len(partial) + len(full) for partial, full in plan.tiles(by_key=by_key)]
        assert plan.order(by_key=by_key) == sorted(range(len(counts)), key=lambda i: (-counts[i], -i))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("trie", [TRIES[0], TRIES[5], TRIES[9], every_offset(40)], ids=str)
def test_the_kernels_build_the_same_plan(trie: TrieShape, window: int | None) -> None:
    assert_same_plan(trie, window, 16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("trie", [*TRIES, chain(20_000), random_forest(5, 5000)], ids=str)
def test_the_gpu_builds_the_same_plan(trie: TrieShape, block: int, window: int | None) -> None:
    assert_same_plan(trie, window, block, "cuda")


def assert_same_plan(trie: TrieShape, window: int | None, block: int, device: str) -> None:
    from tw_kernels.trie_attention.plan_kernels import launch_plan

    want = make_plan(trie.subtree_end, depth=trie.depth, window=window, block=block)
    depth = trie.depth.to(device, torch.int32)
    data = launch_plan(trie.subtree_end.to(device), None if window is None else depth, window, block)
    got = BlockPlan(data, trie.num_rows, block, window)
    for by_key in (False, True):
        assert got.tiles(by_key=by_key) == want.tiles(by_key=by_key)
        assert got.order(by_key=by_key) == want.order(by_key=by_key)


@pytest.mark.gpu
def test_planning_64k_rows_takes_less_than_a_millisecond() -> None:
    """Median of 20 plans of new tensors, the wait for the device included."""
    end = sft_64k().subtree_end.cuda()
    seconds = []
    for _ in range(23):
        fresh = end.clone()
        torch.cuda.synchronize()
        start = time.perf_counter()
        make_plan(fresh)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert median(seconds[3:]) < 1e-3


@pytest.mark.parametrize("block", [0, 8, 48])
def test_block_sizes_are_powers_of_two(block: int) -> None:
    with pytest.raises(ValueError, match="block must be a power of two of at least 16, got"):
        make_plan(chain(5).subtree_end, block=block)


def test_what_is_no_row_of_a_trie_is_refused() -> None:
    end = torch.tensor([2, 2], dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"must have one shape \(N,\), got \(1, 2\) and None; pass one row"):
        make_plan(end[None])
    with pytest.raises(ShapeError, match=r"must have one shape \(N,\), got \(2,\) and \(1,\)"):
        make_plan(end, depth=end[:1], window=1)
    with pytest.raises(ValueError, match=r"window must be at least 1 .*, got 0; pass None for none"):
        make_plan(end, window=0)
    with pytest.raises(ValueError, match=r"subtree_end must be int32 \(or int64\), got torch.float32; take it from"):
        make_plan(end.float())
    with pytest.raises(
        ValueError, match=r"depth must be int32 \(or int64\), got torch.float32; take it from PackedTrie"
    ):
        make_plan(end, depth=end.float(), window=1)
    with pytest.raises(ValueError, match=r"depth must be on the device of subtree_end, cpu, got meta; call PackedTrie"):
        make_plan(end, depth=end.to("meta"), window=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_integer_types_give_one_plan(dtype: torch.dtype) -> None:
    trie = small_tries()[6]
    want = make_plan(trie.subtree_end, depth=trie.depth.int(), window=7, block=16)
    got = make_plan(trie.subtree_end.to(dtype), depth=trie.depth.to(dtype), window=7, block=16)
    assert torch.equal(got.data, want.data)


def test_a_block_of_rows_that_nothing_sees_keeps_its_diagonal() -> None:
    """Such rows are in no forest, and a kernel that waits for the first tile of a block would wait for ever."""
    from tw_kernels.trie_attention.plan_kernels import launch_plan

    end = torch.zeros(300, dtype=torch.int32)
    end[:100] = 100
    plans = [make_plan(end, block=64), BlockPlan(launch_plan(end, None, None, 64), 300, 64)]
    for plan in plans:
        partial = [tiles[0] for tiles in plan.tiles()]
        assert [blocks[-1] for blocks in partial] == list(range(5))
        assert all(len(tiles[0]) + len(tiles[1]) for tiles in plan.tiles(by_key=True))


def test_no_rows() -> None:
    assert make_plan(build("empty", []).subtree_end).tiles() == []


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    memo._values.clear()


def fetch(end: torch.Tensor, window: int | None = None) -> BlockPlan:
    return cached_plan(end, None, window, 16)


def test_layers_share_one_plan() -> None:
    """Each layer makes another view of the (1, N) input."""
    end = small_tries()[5].subtree_end[None].clone()
    first = fetch(end[0])
    assert fetch(end.view(-1)) is first
    assert fetch(end.detach()[0]) is first
    assert fetch(end[0], window=7) is not first
    assert cached_plan(end[0], None, None, 32) is not first
    assert fetch(end[0].clone()) is not first
    assert fetch(end[0, :40]) is not first


def test_a_write_drops_the_plan() -> None:
    end = chain(100).subtree_end.clone()
    before = fetch(end)
    end.copy_(torch.arange(1, 101))  # 100 roots
    after = fetch(end)
    assert before.tiles() != after.tiles()
    assert after.tiles() == make_plan(end, block=16).tiles()
    view = end[:]
    view[:50] = 50
    assert fetch(end).tiles() == make_plan(end, block=16).tiles()


def test_a_freed_address_is_no_key() -> None:
    """Allocators hand the same address to the next batch."""
    for seed in range(8):
        end = random_forest(seed, 200).subtree_end[:150].clamp(max=150).clone()
        assert fetch(end).tiles() == make_plan(end, block=16).tiles()
        del end
        gc.collect()


def test_inference_tensors_are_planned_each_time() -> None:
    """They carry no version, so a write could not be noticed; normal tensors keep their plan, usable for training."""
    end = chain(100).subtree_end.clone()
    with torch.inference_mode():
        inside = end.clone()
        first = fetch(inside)
        inside.copy_(torch.arange(1, 101))
        assert fetch(inside).tiles() != first.tiles()
        kept = fetch(end)
    assert not kept.data.is_inference()
    assert fetch(end) is kept


def test_few_plans_are_kept() -> None:
    ends = [chain(50 + i).subtree_end for i in range(3 * memo.CACHED_VALUES)]
    for end in ends:
        fetch(end)
    assert len(memo._values) == memo.CACHED_VALUES
