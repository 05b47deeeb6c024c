"""Laws of ReasoningTrie on random sequence sets, against a trie that is grown token by token; the recorded cases."""

import json
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sequences import grow, masked_sets, sequence_sets, spelled_edges, trained_edges
from tests.support.trajectories import CharTokenizer, Simulated, simulated
from tw_core import BudgetError, ReasoningTrie, ShapeError, TrieError, Unit, encode_units

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "trie_cases.json").read_text())["cases"]


@given(sequence_sets())
def test_rows_are_the_distinct_prefixes_in_first_seen_preorder(sequences: list[list[int]]) -> None:
    trie, slow = ReasoningTrie.from_sequences(sequences), grow(sequences)
    assert trie.num_tokens == len({tuple(s[: n + 1]) for s in sequences for n in range(len(s))})
    assert trie.input_ids.tolist() == slow.input_ids
    assert trie.position_ids.tolist() == slow.depth
    assert trie.parent.tolist() == slow.parent
    assert trie.subtree_end.tolist() == slow.subtree_end


@given(masked_sets())
def test_sequences_and_masks_come_back(case: tuple[list[list[int]], list[list[bool]]]) -> None:
    sequences, masks = case
    trie = ReasoningTrie.from_sequences(sequences, masks)
    assert trie.num_sequences == len(sequences)
    assert trie.num_expanded_tokens == sum(map(len, sequences))
    assert trie.sharing_ratio == trie.num_expanded_tokens / trie.num_tokens >= 1
    for i, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        assert trie.sequence(i).tolist() == sequence
        assert trie.loss_mask(i).tolist() == [False, *mask[1:]]
        assert trie.sequence_lengths[i] == len(sequence)


@given(masked_sets())
def test_edges_are_the_trained_tokens_with_multiplicity_each_from_its_parent(
    case: tuple[list[list[int]], list[list[bool]]],
) -> None:
    assert spelled_edges(ReasoningTrie.from_sequences(*case).pack()) == trained_edges(*case)


@given(sequence_sets())
def test_no_masks_train_all_but_the_first_token(sequences: list[list[int]]) -> None:
    assert spelled_edges(ReasoningTrie.from_sequences(sequences).pack()) == trained_edges(sequences)


@given(simulated(), st.booleans())
def test_units_train_their_completions_and_each_generated_token_once(played: Simulated, as_pairs: bool) -> None:
    units: list[Any] = played.units if as_pairs else [Unit(a, b) for a, b in played.units]
    if not units:
        with pytest.raises(TrieError, match="units is empty"):
            ReasoningTrie.from_units(units)
        return
    sequences = [context + completion for context, completion in played.units]
    masks = [[False] * len(context) + [True] * len(completion) for context, completion in played.units]
    packed = ReasoningTrie.from_units(units).pack()
    assert spelled_edges(packed) == trained_edges(sequences, masks)
    # Only a completion without a context loses its first token: nothing predicts it.
    generated = sum(len(completion) - (not context) for context, completion in played.units)
    numbers = {tuple(context) for context, _ in played.units}
    assert int(packed.target_weights.sum()) == generated
    if len(numbers) == len(played.units):  # no two calls with one context: every weight is 1
        assert packed.target_weights.tolist() == [1] * generated


def test_a_branch_point_has_a_target_for_each_child() -> None:
    packed = ReasoningTrie.from_sequences([[5, 6, 7], [5, 6, 8], [5, 6, 9], [5, 6, 8]]).pack()
    assert packed.target_rows.tolist() == [0, 1, 1, 1]
    assert packed.target_ids.tolist() == [6, 7, 8, 9]
    assert packed.target_weights.tolist() == [4, 1, 2, 1]


def test_text_gives_the_trie_of_its_units() -> None:
    text = (
        "so\n<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
        "<Thread>\n1: x\n</Thread><Thread>\n2: y\n</Thread>\n</Parallel>\nend"
    )
    tokenizer = CharTokenizer()
    trie = ReasoningTrie.from_text(text, tokenizer, prompt="why?")
    same = ReasoningTrie.from_units(encode_units(text, tokenizer, "why?"))
    np.testing.assert_array_equal(trie.input_ids, same.input_ids)
    np.testing.assert_array_equal(trie.weights, same.weights)
    assert trie.num_sequences == 4
    longest = max((trie.sequence(i).tolist() for i in range(4)), key=len)
    assert tokenizer.decode(longest) == "why?" + text


@pytest.mark.parametrize(
    "convert",
    [
        tuple,
        np.array,
        torch.tensor,
        lambda s: np.array(s, dtype=np.uint16),
        lambda s: torch.tensor(s, dtype=torch.int32),
    ],
)
def test_any_array_like_is_accepted(convert: Any) -> None:
    trie = ReasoningTrie.from_sequences(map(convert, [[3, 1, 2], [3, 1, 4]]), map(convert, [[0, 1, 1], [0, 0, 1]]))
    assert trie.input_ids.tolist() == [3, 1, 2, 4]
    assert trie.input_ids.dtype == np.int64
    assert trie.weights.tolist() == [0, 1, 1, 1]


def test_writing_to_the_inputs_later_changes_nothing() -> None:
    sequences = [np.array([1, 2, 3]), np.array([1, 2, 4])]
    masks = [np.array([True, True, True]), np.array([True, True, True])]
    trie = ReasoningTrie.from_sequences(sequences, masks)
    for array in (*sequences, *masks):
        array[:] = 0
    assert [p.sequence(0).tolist() for p in trie.split(3)] == [[1, 2, 3], [1, 2, 4]]
    assert trie.pack().target_weights.tolist() == [2, 1, 1]


# --------------------------------------------------------------------------------------------------------------- split


@given(masked_sets(), st.integers(0, 14))
def test_split_keeps_sequences_edges_and_budget(case: tuple[list[list[int]], list[list[bool]]], spare: int) -> None:
    sequences, masks = case
    budget = max(map(len, sequences)) + spare
    parts = ReasoningTrie.from_sequences(sequences, masks).split(budget)
    assert all(part.num_tokens <= budget for part in parts)
    assert sorted(np.concatenate([part.origin for part in parts]).tolist()) == list(range(len(sequences)))
    for part in parts:
        assert part.origin.tolist() == sorted(part.origin.tolist())
        for here, i in enumerate(part.origin.tolist()):
            assert part.sequence(here).tolist() == sequences[i]
            assert part.loss_mask(here).tolist() == [False, *masks[i][1:]]
    edges: Counter[Any] = sum((spelled_edges(part.pack()) for part in parts), Counter())
    assert edges == trained_edges(sequences, masks)


@given(sequence_sets(most=7), st.integers(0, 8))
def test_split_repeats_as_few_rows_as_any_cut_in_preorder_then_makes_as_few_parts(
    sequences: list[list[int]], spare: int
) -> None:
    budget = max(map(len, sequences)) + spare
    trie = ReasoningTrie.from_sequences(sequences)
    order = np.argsort(trie.sequence_ends, kind="stable").tolist()
    costs = []
    for cut in product([False, True], repeat=len(order) - 1):
        bounds = [0, *(i + 1 for i, here in enumerate(cut) if here), len(order)]
        sizes = [len(grow([sequences[i] for i in order[a:b]]).prefixes) for a, b in pairwise(bounds)]
        if max(sizes) <= budget:
            costs.append((sum(sizes), len(sizes)))
    parts = trie.split(budget)
    assert (sum(part.num_tokens for part in parts), len(parts)) == min(costs)


def test_parts_of_parts_know_their_first_numbers() -> None:
    sequences = [[0, i, i, i] for i in range(8)]
    parts = [p for half in ReasoningTrie.from_sequences(sequences).split(13) for p in half.split(4)]
    assert [p.origin.tolist() for p in parts] == [[i] for i in range(8)]
    assert [p.sequence(0).tolist() for p in parts] == sequences


def test_a_trie_within_the_budget_is_not_cut() -> None:
    trie = ReasoningTrie.from_sequences([[1, 2], [1, 3]])
    assert trie.split(3) == [trie]


# -------------------------------------------------------------------------------------------------------------- golden


def _golden_cases() -> list[Any]:
    cases = [case for case in GOLDEN if not case.get("error") and not case.get("max_length")]
    assert len(cases) == 122
    return [pytest.param(case, id=f"{i}-{case['kind']}") for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", _golden_cases())
def test_recorded_rows(case: dict[str, Any]) -> None:
    first = case["input_ids"] if case["seq0_is_input"] else case["seq0"]
    trie = ReasoningTrie.from_sequences([first, *(first[:n] + tail for n, tail in case["others"])])
    assert trie.input_ids.tolist() == case["flat_ids"]
    assert trie.position_ids.tolist() == case["position_ids"]
    assert trie.parent.tolist() == case["parent"]
    assert trie.subtree_end.tolist() == case["col_end"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([], TrieError, r"sequences is empty; pass at least one"),
        ([[1], []], TrieError, r"sequences\[1\] is empty; drop it"),
        ([[1, -100]], TrieError, r"sequences\[0\] must not be negative, got -100 at index 1; drop padding"),
        ([[1], [2.0]], TrieError, r"sequences\[1\] must hold integers, got dtype float64; pass token ids"),
        ([[True, False]], TrieError, r"sequences\[0\] must hold integers, got dtype bool"),
        ([["a"]], TrieError, r"sequences\[0\] must hold integers, got dtype <U1; pass token ids, not text"),
        ([1, 2], ShapeError, r"sequences\[0\] must have shape \(L,\), got \(\); pass one flat sequence"),
        ([[[1, 2]]], ShapeError, r"sequences\[0\] must have shape \(L,\), got \(1, 2\)"),
        (
            [[[1, 2], [3]]],
            ShapeError,
            r"sequences\[0\] must be one flat sequence .* got a list of uneven parts; pass a list",
        ),
        (
            [torch.ones(2, device="meta")],
            ShapeError,
            r"sequences\[0\] must be .* on the CPU, got a Tensor of torch.float32 on meta; .*\.cpu",
        ),
        (
            [torch.ones(2, requires_grad=True)],
            ShapeError,
            r"must be .* integer token ids .*, got a Tensor of torch.float",
        ),
        ([torch.ones(2).bfloat16()], ShapeError, r"must be .* integer token ids .*, got a Tensor of torch.bfloat16"),
        (
            [np.array([1, 2**63], dtype=np.uint64)],
            TrieError,
            r"must fit int64, got 9223372036854775808 at index 1; pass",
        ),
    ],
)
def test_bad_sequences_are_named(sequences: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReasoningTrie.from_sequences(sequences)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([[1, 1, 1]], ShapeError, r"loss_masks must have one mask a sequence, 2, got 1; pass None"),
        (
            [[1, 1], [1, 1]],
            ShapeError,
            r"loss_masks\[0\] must have shape \(L,\)=\(3,\) to match sequences\[0\], got \(2,\)",
        ),
        ([[1, 1, 1], 1], ShapeError, r"loss_masks\[1\] must have shape \(L,\)=\(2,\) .* got \(\)"),
        ([[0, 1, 2], [1, 1]], TrieError, r"loss_masks\[0\] must hold 0 and 1 .*; pass a mask, not weights"),
        ([[0, 1, 1], [0.5, 1]], TrieError, r"loss_masks\[1\] must hold 0 and 1"),
    ],
)
def test_bad_masks_are_named(masks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReasoningTrie.from_sequences([[1, 2, 3], [1, 2]], masks)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], r"units is empty; pass at least one unit"),
        ([([1], [2]), ([], [])], r"units\[1\] is empty; drop it"),
        ([7], r"units\[0\] must be a pair \(context, completion\), got 1 parts"),
        ([([1], [2], [3])], r"units\[0\] must be a pair \(context, completion\), got 3 parts"),
        ([([1], [-2])], r"units\[0\]\.completion must not be negative, got -2"),
        ([([1.5], [2])], r"units\[0\]\.context must hold integers, got dtype float64"),
    ],
)
def test_bad_units_are_named(units: Any, message: str) -> None:
    with pytest.raises(TrieError, match=message):
        ReasoningTrie.from_units(units)


@pytest.mark.parametrize("budget", [3, 0, -1])
def test_a_sequence_over_the_budget_is_named(budget: int) -> None:
    trie = ReasoningTrie.from_sequences([[1, 2], [1, 2, 3, 4]])
    message = rf"sequence 1 has 4 tokens, more than max_tokens={budget}; raise max_tokens or drop the sequence"
    with pytest.raises(BudgetError, match=message):
        trie.split(budget)


def test_repr_says_what_it_is() -> None:
    trie = ReasoningTrie.from_sequences([[1, 2], [1, 3]])
    assert repr(trie) == "ReasoningTrie(num_tokens=3, num_sequences=2, sharing_ratio=1.33)"
