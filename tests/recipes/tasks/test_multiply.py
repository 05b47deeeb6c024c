"""The product of integers: every step is right in both styles, texts have the format, token counts are pinned."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.arithmetic import holds_true_equations
from tw_core import TagIds, check_format, encode_units, parallel_stats, parse, render
from tw_recipes.tasks import TASKS, ProductOfIntegers, get_task
from tw_recipes.tasks.longhand import FACTOR, PLACES, PRODUCT
from tw_recipes.tasks.multiply import LABEL

FLAT, NESTED = ProductOfIntegers(), ProductOfIntegers(nested=True)
TOKENIZER = NESTED.tokenizer()


def _reads(text: str) -> dict[str, set[str]]:
    """The digits that stand right after each label."""
    found: dict[str, set[str]] = {}
    for label, digit in re.findall(rf"({LABEL})(\d)", text):
        found.setdefault(label, set()).add(digit)
    return found


def _number(digits: dict[str, set[str]], prefix: str) -> int:
    places = [place for place in PLACES if prefix + place in digits]
    return sum(int(next(iter(digits[prefix + place]))) * 10 ** PLACES.index(place) for place in places)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 8), st.booleans(), st.sampled_from(["sequential", "forkjoin"]))
def test_every_labelled_digit_is_the_one_its_label_names(seed: int, length: int, nested: bool, style: str) -> None:
    task = ProductOfIntegers(length, length, nested)
    (problem,) = task.problems(1, seed=seed)
    (row,) = task.rows(1, seed=seed, style=style)
    text = row["prompt"] + row["text"]
    digits = _reads(text)
    assert all(len(values) == 1 for values in digits.values())  # a label never means two things
    assert [_number(digits, f"{i + 1}{FACTOR}") for i in range(length)] == list(problem)
    products = {_number(digits, f"{node}{PRODUCT}") for node in range(1, length)}
    assert math.prod(problem) in products
    # Digit products: label and digit of the factor, label of the row, digit, carry.
    for line in text.split("\n"):
        if "*" not in line or "Outline" in line or "?" in line:
            continue
        head = re.search(rf"{LABEL}(\d)\*", line)
        if head is None:
            continue
        carry = 0
        entries = re.findall(rf"{LABEL}(\d){LABEL}(\d)(\d)", line[head.end() :])
        assert entries
        for x, digit, carried in entries:
            both = int(x) * int(head[1]) + carry
            assert (int(digit), int(carried)) == (both % 10, both // 10)
            carry = both // 10
        assert line.endswith(str(carry))
    expected = str(math.prod(problem)).zfill(3 * length)[::-1]
    assert row["answer"] == expected
    assert row["text"].endswith("\\boxed{" + expected + "}")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 8), st.booleans())
def test_fork_join_texts_have_the_format(seed: int, length: int, nested: bool) -> None:
    task = ProductOfIntegers(length, length, nested)
    for plain in (False, True):
        (row,) = task.rows(1, seed=seed, plain=plain)
        assert check_format(row["text"], require_block=True, canonical=True).problems == ()
        assert render(parse(row["text"])) == row["text"]
        (chain,) = task.rows(1, seed=seed, plain=plain, style="sequential")
        assert check_format(chain["text"]).ok
        assert "<Parallel>" not in chain["text"]
        assert (chain["prompt"], chain["answer"]) == (row["prompt"], row["answer"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["sequential", "forkjoin"]))
def test_plain_texts_hold_true_equations(seed: int, nested: bool, style: str) -> None:
    task = ProductOfIntegers(nested=nested)
    (problem,) = task.problems(1, seed=seed)
    (row,) = task.rows(1, seed=seed, style=style, plain=True)
    assert row["prompt"] == f"What is {' * '.join(map(str, problem))}?\n"
    assert int(row["answer"]) == math.prod(problem)
    assert holds_true_equations(row["text"]) >= 3 * (len(problem) - 1)
    assert task.grader().grade(row["text"], row["answer"]).correct


def test_token_counts_and_what_forking_saves() -> None:
    """Sequential tokens, flat and nested critical path; the counts of a length do not depend on the digits."""
    tags = TagIds.from_tokenizer(TOKENIZER)
    found = {}
    for length in range(5, 9):
        chain, flat, nested = (
            [TOKENIZER.encode(row["text"]) for row in task.rows(3, seed=1, style=style)]
            for task, style in (
                (ProductOfIntegers(length, length), "sequential"),
                (ProductOfIntegers(length, length), "forkjoin"),
                (ProductOfIntegers(length, length, nested=True), "forkjoin"),
            )
        )
        assert all(len({len(ids) for ids in texts}) == 1 for texts in (chain, flat, nested))
        stats = [parallel_stats(texts[0], tags) for texts in (flat, nested)]
        found[length] = (len(chain[0]), *(s.critical_path_tokens for s in stats))
        assert stats[0].max_depth == 1
        assert stats[1].max_depth == 2
    assert found == {
        5: (1123, 850, 858),
        6: (1624, 1118, 984),
        7: (2215, 1407, 1305),
        8: (2896, 1528, 1396),
    }
    # More factors fork better; the mean is beyond the 1.5 that the reproduction asks for.
    flat, nested = ([chain / path[i] for chain, *path in found.values()] for i in (0, 1))
    assert flat == sorted(flat)
    assert nested == sorted(nested)
    assert sum(flat) / 4 > 1.5
    assert sum(nested) / 4 > 1.65


def test_tokenizer_is_one_to_one_and_training_ids_are_those_of_the_text() -> None:
    for task in (FLAT, NESTED):
        tokenizer = task.tokenizer()
        for style in ("sequential", "forkjoin"):
            for row in task.rows(6, seed=3, style=style):
                for text in (row["prompt"], row["text"], row["answer"]):
                    ids = tokenizer.encode(text)
                    assert tokenizer.unk_token_id not in ids
                    assert tokenizer.decode(ids) == text
    (row,) = NESTED.rows(1, seed=3)
    last = max(encode_units(row["text"], TOKENIZER, prompt=row["prompt"]), key=lambda unit: len(unit.context))
    assert [*last.context, *last.completion] == TOKENIZER.encode(row["prompt"] + row["text"])


def test_streams_are_stable_lengths_mixed_and_splits_disjoint() -> None:
    seen = {
        split: {p for seed in range(2) for p in FLAT.problems(3000, seed=seed, split=split)}
        for split in ("train", "test")
    }
    assert [len(problems) for problems in seen.values()] == [6000, 6000]
    assert not seen["train"] & seen["test"]
    counts = [sum(len(problem) == length for problem in seen["train"]) for length in range(5, 9)]
    assert min(counts) > 1350
    assert FLAT.problems(9, seed=1) == FLAT.problems(3000, seed=1)[:9]
    rows = FLAT.rows(30, seed=4)
    assert FLAT.rows(10, seed=4, offset=20) == rows[20:]
    assert [row["difficulty"] for row in rows] == [str(len(problem)) for problem in FLAT.problems(30, seed=4)]


def test_short_problems_do_not_share_splits_either() -> None:
    # Three factors: with enough draws the same problem comes up again; its split must not depend on the seed.
    task = ProductOfIntegers(3, 3)
    train, test = (set(task.problems(20_000, seed=seed, split=split)) for seed, split in ((0, "train"), (1, "test")))
    assert not train & test


def test_registry_and_arguments() -> None:
    assert get_task("multiply") is TASKS["multiply"]
    assert get_task("multiply", nested=True) == NESTED
    with pytest.raises(ValueError, match="3 <= least <= most <= 8, got 2 and 8"):
        ProductOfIntegers(2)
    with pytest.raises(ValueError, match="style must be"):
        FLAT.rows(1, seed=0, style="tree")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        FLAT.rows(0, seed=0)
