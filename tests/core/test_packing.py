"""Laws of PackedTrie and pack_forest: what is packed comes back, forests keep their tries apart, rows are filled."""

from dataclasses import fields
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sequences import grow, lognormal_sizes, masked_sets, sequence_sets, spelled_edges, trained_edges
from tw_core import BudgetError, PackedTrie, ReasoningTrie, TrieError, pack_forest
from tw_core.masks import check_forest
from tw_core.packing import plan_forest

DTYPES = {
    **dict.fromkeys(["input_ids", "position_ids", "target_rows", "target_ids", "target_weights"], torch.int64),
    **dict.fromkeys(["parent", "subtree_end", "sequence_ends"], torch.int32),
    "target_children": torch.int64,
    "loss_mask": torch.bool,
}


def packed(sequences: Any, masks: Any = None) -> PackedTrie:
    return ReasoningTrie.from_sequences(sequences, masks).pack()


def assert_same(found: PackedTrie, expected: PackedTrie) -> None:
    for name, dtype in DTYPES.items():
        assert getattr(found, name).dtype == dtype, name
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert found.num_padding == expected.num_padding


def test_every_field_has_its_dtype() -> None:
    row = packed([[1, 2], [1, 3]])
    assert {f.name: getattr(row, f.name).dtype for f in fields(PackedTrie) if f.name != "num_padding"} == DTYPES


@given(sequence_sets())
def test_unpacking_undoes_packing(sequences: list[list[int]]) -> None:
    row = packed(sequences)
    assert [s.tolist() for s in row.sequences()] == sequences
    assert row.num_sequences == len(sequences)
    assert row.num_expanded_tokens == sum(map(len, sequences))
    assert row.sequence_lengths.tolist() == [len(s) for s in sequences]
    assert row.sharing_ratio == sum(map(len, sequences)) / row.num_tokens


@given(sequence_sets())
def test_visible_rows_spell_the_prefix_of_their_row(sequences: list[list[int]]) -> None:
    row = packed(sequences)
    mask, ids = row.dense_mask().numpy(), row.input_ids.numpy()
    assert [tuple(ids[visible].tolist()) for visible in mask] == grow(sequences).prefixes


@given(masked_sets())
def test_rows_and_targets_of_each_sequence(case: tuple[list[list[int]], list[list[bool]]]) -> None:
    sequences, masks = case
    row = packed(sequences, masks)
    tokens, rows = row.trained_tokens(), row.expanded_rows().split(row.sequence_lengths.tolist())
    assert len(tokens.targets) == int(row.target_weights.sum())
    for i, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        path = row.sequence_rows(i)
        assert path.tolist() == rows[i].tolist()
        assert row.input_ids[path].tolist() == sequence
        assert row.position_ids[path].tolist() == list(range(len(sequence)))
        assert row.parent[path].tolist() == [-1, *path[:-1].tolist()]
        offsets, targets = row.sequence_targets(i)
        assert offsets.tolist() == [at for at in range(1, len(sequence)) if mask[at]]
        assert row.target_ids[targets].tolist() == [sequence[at] for at in offsets]
        assert row.target_rows[targets].tolist() == [int(path[at - 1]) for at in offsets]
        mine = tokens.sequences == i
        assert tokens.offsets[mine].tolist() == offsets.tolist()
        assert tokens.targets[mine].tolist() == targets.tolist()


@given(masked_sets())
def test_weights_count_the_sequences_that_train_a_target(case: tuple[list[list[int]], list[list[bool]]]) -> None:
    row = packed(*case)
    counts = torch.bincount(row.trained_tokens().targets, minlength=len(row.target_weights))
    assert counts.tolist() == row.target_weights.tolist()
    assert (row.target_weights >= 1).all()
    assert (row.target_children.diff() > 0).all()


@given(st.lists(masked_sets(), min_size=1, max_size=4), st.integers(0, 5))
def test_a_forest_keeps_its_tries_apart_and_padding_apart_from_them(cases: list[Any], padding: int) -> None:
    rows = [packed(*case) for case in cases]
    forest = PackedTrie.concat(rows)
    padded = forest.pad_to(forest.num_rows + padding)
    expected = torch.block_diag(*(row.dense_mask() for row in rows), torch.eye(padding)).bool()
    torch.testing.assert_close(padded.dense_mask(), expected[: padded.num_rows, : padded.num_rows])
    check_forest(padded.subtree_end, padded.position_ids)
    assert padded.num_padding == padding
    assert padded.num_tokens == forest.num_rows
    sequences, masks = [s for case in cases for s in case[0]], [m for case in cases for m in case[1]]
    for row in (forest, padded):
        assert [s.tolist() for s in row.sequences()] == sequences
        assert [row.input_ids[row.sequence_rows(i)].tolist() for i in range(len(sequences))] == sequences
        assert spelled_edges(row) == trained_edges(sequences, masks)
        for i, mask in enumerate(masks):
            offsets, targets = row.sequence_targets(i)
            assert offsets.tolist() == [at for at in range(1, len(mask)) if mask[at]]
            assert row.target_ids[targets].tolist() == [sequences[i][at] for at in offsets]
    added = slice(forest.num_rows, None)
    assert padded.parent[added].tolist() == [-1] * padding
    assert padded.position_ids[added].tolist() == [0] * padding
    assert padded.subtree_end[added].tolist() == list(range(forest.num_rows + 1, padded.num_rows + 1))


def test_sequences_without_a_trained_token_make_no_target() -> None:
    row = packed([[1], [2, 3]], [[1], [1, 0]])
    assert len(row.target_rows) == len(row.trained_tokens().targets) == len(row.sequence_targets(1)[0]) == 0


def test_padding_twice_is_padding_once_and_none_is_none() -> None:
    row = packed([[1, 2], [1, 3]])
    assert row.pad_to(3) is row
    assert_same(row.pad_to(5).pad_to(9), row.pad_to(9))


def test_to_moves_every_tensor() -> None:
    row = packed([[1, 2], [1, 3]])
    moved = row.pad_to(4).to("meta")
    assert {getattr(moved, name).device.type for name in DTYPES} == {"meta"}
    assert moved.device.type == "meta"
    assert moved.num_padding == 1
    assert_same(row.to("cpu"), row)


def test_bad_rows_are_named() -> None:
    row = packed([[1, 2], [1, 3]])
    with pytest.raises(TrieError, match=r"packed is empty; pass at least one PackedTrie"):
        PackedTrie.concat([])
    with pytest.raises(TrieError, match=r"must be on one device, got cpu, meta; call \.to\(device\) on each first"):
        PackedTrie.concat([row, row.to("meta")])
    with pytest.raises(TrieError, match=r"packed\[1\] has 2 rows of padding; concatenate first, then pad"):
        PackedTrie.concat([row, row.pad_to(5)])
    with pytest.raises(BudgetError, match=r"n must be at least the number of rows, 3, got 2; split the trie"):
        row.pad_to(2)


# --------------------------------------------------------------------------------------------------------- pack_forest


@given(st.lists(sequence_sets(most=3), max_size=8), st.integers(0, 30))
def test_pack_forest_holds_every_trie_once_in_order(sets: list[list[list[int]]], spare: int) -> None:
    tries = [ReasoningTrie.from_sequences(sequences) for sequences in sets]
    budget = max((trie.num_tokens for trie in tries), default=1) + spare
    bins = plan_forest([trie.num_tokens for trie in tries], budget)
    forests = pack_forest(tries, budget)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(tries)))
    assert bins == sorted(sorted(chosen) for chosen in bins)
    assert all(forest.num_rows <= budget for forest in forests)
    assert len(forests) == len(bins)
    for forest, chosen in zip(forests, bins, strict=True):
        assert_same(forest, PackedTrie.concat([tries[i].pack() for i in chosen]))


@given(st.lists(st.integers(1, 10), min_size=1, max_size=7))
def test_best_fit_opens_no_more_rows_than_its_bound(sizes: list[int]) -> None:
    """At most 11/9 of the fewest + 6/9 (Dósa 2007, the bound of best-fit and first-fit decreasing)."""
    found = len(plan_forest(sizes, 10))
    assert found <= 11 / 9 * _fewest_bins(tuple(sorted(sizes)), 10) + 6 / 9


def _fewest_bins(sizes: tuple[int, ...], budget: int) -> int:
    """By trying every set that goes with the largest."""
    if not sizes:
        return 0
    *rest, largest = sizes
    best = len(sizes)
    for count in range(len(rest) + 1):
        for chosen in combinations(range(len(rest)), count):
            if largest + sum(rest[i] for i in chosen) <= budget:
                left = tuple(size for i, size in enumerate(rest) if i not in chosen)
                best = min(best, 1 + _fewest_bins(left, budget))
    return best


def test_lognormal_sizes_fill_97_percent() -> None:
    sizes = lognormal_sizes(2_000, seed=0, largest=8_192).tolist()
    bins = plan_forest(sizes, 8_192)
    assert sum(sizes) / (len(bins) * 8_192) >= 0.97


def test_a_trie_over_the_budget_is_named() -> None:
    tries = [ReasoningTrie.from_sequences([np.zeros(n, dtype=np.int64)]) for n in (2, 5)]
    with pytest.raises(BudgetError, match=r"tries\[1\] has 5 rows, more than max_tokens=4; use trie\.split"):
        pack_forest(tries, 4)
