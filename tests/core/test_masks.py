"""The visibility predicate, its views, and what is derived from subtree_end, each against plain loops."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.sequences import grow, sequence_sets
from tw_core import ReasoningTrie, ShapeError, TrieError, masks


@st.composite
def depths(draw: st.DrawFn, most: int = 40) -> Tensor:
    """Depths of a random forest in preorder: each row is at most one below the row before it."""
    rows: list[int] = []
    for step in draw(st.lists(st.integers(0, 6), max_size=most - 1)):
        rows.append(max(0, rows[-1] + 1 - step // 2) if rows else 0)  # two in seven go straight down
    return torch.tensor(rows or [0])


def ends(depth: Tensor) -> Tensor:
    """subtree_end by its definition."""
    n = len(depth)
    found = [next((j for j in range(i + 1, n) if depth[j] <= depth[i]), n) for i in range(n)]
    return torch.tensor(found, dtype=torch.int32)


def seen(end: Tensor, depth: Tensor, window: int | None = None) -> Tensor:
    """Visibility by walking up from each row, `window` rows at most."""
    n = len(end)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        path = [j for j in range(i + 1) if i < end[j]]
        mask[i, path if window is None else path[-window:]] = True
    return mask


def evaluated(function: Callable[..., Tensor], n: int) -> Tensor:
    """A mask_mod on every pair."""
    rows = torch.arange(n)
    zero = torch.zeros((), dtype=torch.int64)
    return torch.stack([torch.stack([function(zero, zero, i, j) for j in rows]) for i in rows])


@given(sequence_sets())
def test_a_row_sees_its_ancestors_and_itself(sequences: list[list[int]]) -> None:
    trie, prefixes = ReasoningTrie.from_sequences(sequences), grow(sequences).prefixes
    expected = torch.tensor([[a[: len(b)] == b for b in prefixes] for a in prefixes])
    assert torch.equal(masks.dense_mask(torch.from_numpy(trie.subtree_end)), expected)


@given(depths(most=12), st.none() | st.integers(1, 5))
def test_the_views_agree(depth: Tensor, window: int | None) -> None:
    end = ends(depth)
    expected = seen(end, depth, window)
    assert torch.equal(evaluated(masks.mask_mod(end, depth=depth, window=window), len(end)), expected)
    assert torch.equal(evaluated(masks.mask_mod(end, window=window), len(end)), expected)
    if window is None:
        assert torch.equal(masks.dense_mask(end), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_additive_mask_hides_in_its_own_dtype(dtype: torch.dtype) -> None:
    end = ends(torch.tensor([0, 1, 2, 1, 0, 1]))
    mask = masks.additive_mask(end, dtype)
    assert mask.shape == (1, 1, 6, 6)
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()
    logits = torch.randn(1, 2, 6, 6, dtype=dtype)
    hidden = (logits + mask).softmax(-1)[..., ~masks.dense_mask(end)]
    assert (hidden == 0).all()


# --------------------------------------------------------------------------------------------------------------- blocks


@given(depths(), st.sampled_from([1, 2, 3, 4, 7, 8, 16, 64]))
def test_blocks_are_skipped_full_or_partial_exactly(depth: Tensor, size: int) -> None:
    end = ends(depth)
    partial, full = _chosen(end, size)
    pairs = seen(end, depth)
    for i, queries in enumerate(pairs.split(size)):
        for j, tile in enumerate(queries.split(size, dim=1)):
            assert full[i, j] == tile.all(), (i, j)
            assert partial[i, j] == (tile.any() and not tile.all()), (i, j)


@given(depths(), st.sampled_from([1, 2, 3, 4, 7, 8, 16, 64]), st.integers(1, 9), st.booleans())
def test_a_window_skips_and_fills_only_what_it_may(depth: Tensor, size: int, window: int, derive: bool) -> None:
    """Depth bounds are not exact: a block may be tested in vain, never skipped or taken as full wrongly."""
    end = ends(depth)
    partial, full = _chosen(end, size, window=window, depth=None if derive else depth)
    pairs = seen(end, depth, window)
    for i, queries in enumerate(pairs.split(size)):
        for j, tile in enumerate(queries.split(size, dim=1)):
            assert tile.all() or not full[i, j], (i, j)
            assert partial[i, j] or full[i, j] or not tile.any(), (i, j)


def test_a_window_leaves_out_far_blocks_and_keeps_near_ones_full() -> None:
    """On a chain the bounds are exact: row 32 sees back to row 8, so block 4 does not meet block 0."""
    partial, full = _chosen(torch.full((64,), 64, dtype=torch.int32), 8, window=25)
    distance = torch.arange(8)[:, None] - torch.arange(8)
    assert torch.equal(full, (distance > 0) & (distance <= 2))
    assert torch.equal(partial, (distance == 0) | (distance == 3))


def test_no_row_has_no_block_mask() -> None:
    with pytest.raises(ShapeError, match=r"subtree_end must have at least one row, got shape \(0,\)"):
        masks.block_mask(torch.zeros(0, dtype=torch.int32))


def _chosen(end: Tensor, size: int, **options: object) -> tuple[Tensor, Tensor]:
    """(B, B) partial and full blocks of the BlockMask."""
    mask = masks.block_mask(end, size, **options)  # type: ignore[arg-type]
    assert mask.seq_lengths == (len(end), len(end))
    tables = []
    for counts, columns in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        table = torch.zeros(columns.shape[-2:], dtype=torch.bool)
        for i, count in enumerate(counts[0, 0].tolist()):
            chosen = columns[0, 0, i, :count]
            assert (chosen.diff() > 0).all()
            table[i, chosen.long()] = True
        tables.append(table)
    assert not (tables[0] & tables[1]).any()
    return tables[0], tables[1]


@given(depths(), st.integers(1, 45))
def test_block_bounds(depth: Tensor, size: int) -> None:
    low, high = masks.block_bounds(depth, size)
    assert low.tolist() == [int(block.min()) for block in depth.split(size)]
    assert high.tolist() == [int(block.max()) for block in depth.split(size)]


# -------------------------------------------------------------------------------------------------------------- derived


@given(depths())
def test_depth_alone_gives_the_rest(depth: Tensor) -> None:
    end = masks.subtree_end_from_depth(depth)
    assert end.dtype == torch.int32
    assert torch.equal(end, ends(depth))
    assert torch.equal(masks.depth_from_subtree_end(end), depth.int())
    parents = [max((j for j in range(i) if depth[j] == depth[i] - 1), default=-1) for i in range(len(depth))]
    assert masks.parent_from_subtree_end(end).tolist() == parents
    masks.check_forest(end)
    masks.check_forest(end, depth)


def test_no_row_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    for function in (masks.subtree_end_from_depth, masks.depth_from_subtree_end, masks.parent_from_subtree_end):
        assert function(none).shape == (0,)
    masks.check_forest(none, none)


@given(st.lists(st.integers(-1, 8), min_size=1, max_size=7))
def test_check_forest_accepts_exactly_the_forests(values: list[int]) -> None:
    n = len(values)
    inside = all(i < end <= n for i, end in enumerate(values))
    nested = all(values[j] <= values[i] for i in range(n) for j in range(i, max(i, min(values[i], n))))
    if inside and nested:
        masks.check_forest(torch.tensor(values))
    else:
        with pytest.raises(TrieError, match=r"crosses another" if inside else r"subtree_end\[\d+\] must lie in"):
            masks.check_forest(torch.tensor(values))


@given(depths(), st.integers(0, 39), st.sampled_from([-1, 1]))
def test_check_forest_sees_one_wrong_depth(depth: Tensor, row: int, change: int) -> None:
    """Below a root, or at a root with children, a shift of one row breaks the rise by one."""
    row %= len(depth)
    end = ends(depth)
    if depth[row] == 0 and end[row] == row + 1:
        return  # a lone row may stand at any depth: a root's position is free
    wrong = depth.clone()
    wrong[row] += change
    with pytest.raises(TrieError, match=r"position_ids must rise by one from parent to child"):
        masks.check_forest(end, wrong)


def test_check_forest_names_the_row() -> None:
    end = torch.tensor([4, 3, 4, 4])
    with pytest.raises(TrieError, match=r"subtree of row 1, which ends at 3, crosses another"):
        masks.check_forest(end)
    with pytest.raises(
        TrieError, match=r"subtree_end\[3\] must lie in 4\.\.4, got 5; take subtree_end from PackedTrie"
    ):
        masks.check_forest(torch.tensor([4, 2, 4, 5]))
    with pytest.raises(TrieError, match=r"position_ids\[2\] is 5 where 1 was expected"):
        masks.check_forest(torch.tensor([3, 2, 3]), torch.tensor([0, 1, 5]))
    with pytest.raises(ShapeError, match=r"must have one shape \(N,\), got \(3,\) and \(2,\)"):
        masks.check_forest(torch.tensor([3, 2, 3]), torch.tensor([0, 1]))
