"""Problems of which some decompose: both kinds are right, only one kind forks, prompts tell them apart."""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.arithmetic import holds_true_equations
from tw_core import check_format
from tw_recipes.tasks import SomeDecompose

TASK = SomeDecompose()
TOKENIZER = TASK.tokenizer()


def _backwards(digits: str) -> int:
    return int(digits[::-1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 3, 4]), st.sampled_from(["train", "test"]))
@example(1034, 3, "test")  # none of the first draw belongs to this split
def test_answers_are_right_and_only_parallel_problems_fork(seed: int, terms: int, split: str) -> None:
    task = SomeDecompose(terms)
    factors, parallel = task.problems(6, seed=seed, split=split)
    forked = task.rows(6, seed=seed, split=split)
    chained = task.rows(6, seed=seed, split=split, style="sequential")
    for pairs, fork, one, two in zip(factors.tolist(), parallel, forked, chained, strict=True):
        assert (one["prompt"], one["answer"]) == (two["prompt"], two["answer"])
        assert check_format(one["text"], require_block=bool(fork), canonical=True).ok
        assert "<Parallel>" not in two["text"]
        assert task.grader().grade(one["text"], one["answer"]).correct
        assert one["difficulty"] == ("parallel" if fork else "serial")
        products = [a * b for a, b in pairs]
        if fork:
            assert _backwards(one["answer"]) == sum(products)
            continue
        assert one["text"] == two["text"]
        assert _backwards(one["answer"]) == products[-1]
        # What the prompt shows is enough: the first factor and the multipliers.
        start, *by = re.findall(r"\d[wy](\d)\d[xz](\d)", one["prompt"])
        value = int(start[1] + start[0])
        for place, (low, high) in enumerate(by):
            value = (value if place == 0 else value % 100) * int(high + low)
            assert re.search(rf"={place + 1}a{value % 10}{place + 1}b{value // 10 % 10}", one["text"])
        assert value == _backwards(one["answer"])


def test_both_kinds_come_up_and_the_share_can_be_set() -> None:
    assert 900 < TASK.problems(2000, seed=0)[1].sum() < 1100
    assert SomeDecompose(parallel_share=1.0).problems(50, seed=0)[1].all()
    assert not SomeDecompose(parallel_share=0.0).problems(50, seed=0)[1].any()


def test_tokenizer_and_lengths() -> None:
    lengths: dict[str, set[int]] = {}
    for row in TASK.rows(60, seed=1):
        ids = TOKENIZER.encode(row["prompt"] + row["text"])
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == row["prompt"] + row["text"]
        lengths.setdefault(row["difficulty"], set()).add(len(TOKENIZER.encode(row["text"])))
    assert lengths == {"parallel": {472}, "serial": {328}}


def test_splits_do_not_meet_and_a_serial_problem_has_one_spelling() -> None:
    # Two terms: few serial problems exist, so a split that looked at unseen factors would leak.
    task = SomeDecompose(2, parallel_share=0.0)
    shown = {}
    for split in ("train", "test"):
        rows = task.rows(3000, seed=0, split=split)
        shown[split] = {row["prompt"] for row in rows}
        assert len(shown[split]) == 3000
    assert not shown["train"] & shown["test"]


def test_streams_are_stable() -> None:
    whole = TASK.rows(30, seed=4)
    assert TASK.rows(10, seed=4, offset=20) == whole[20:]
    np.testing.assert_array_equal(TASK.problems(7, seed=1)[0], TASK.problems(300, seed=1)[0][:7])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_plain_texts_hold_true_equations(seed: int) -> None:
    for row in TASK.rows(4, seed=seed, plain=True):
        holds_true_equations(row["text"])
        assert TASK.grader().grade(row["text"], row["answer"]).correct
        assert check_format(row["text"], canonical=True, require_block=row["difficulty"] == "parallel").ok


def test_arguments() -> None:
    with pytest.raises(ValueError, match="terms must be 2, 3 or 4, got 5"):
        SomeDecompose(5)
    with pytest.raises(ValueError, match=r"parallel_share must be within 0\.\.1, got 2"):
        SomeDecompose(parallel_share=2)


def test_asking_for_more_problems_than_there_are_ends() -> None:
    """It drew for ever: with two terms, none of them parallel, a sixteenth of 100^3 problems is in the test split."""
    with pytest.raises(
        ValueError, match=r"count must be at most 62\d\d\d, all that this split has, got 70000; ask for"
    ):
        SomeDecompose(terms=2, parallel_share=0.0).problems(70_000, seed=0, split="test")
