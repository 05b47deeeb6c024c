"""`self_train_select`: reasons, duplicates, balance by problem, by acceleration and by plain text."""

from collections import Counter
from typing import Any

import pytest

from tests.support.text import CHAIN_TEXT, FORK_TEXT
from tw_recipes.datagen import self_train_select
from tw_recipes.datagen.self_training import Candidate, balance
from tw_recipes.evaluation.grading import ExactGrader, Grade

BOXED = FORK_TEXT + " \\boxed{{{c}}}"


def line(key: str, text: str = BOXED, a: int = 2, latency: int = 80, **more: Any) -> dict[str, Any]:
    """A line of `threadweaver rollout`."""
    values = {"a": a, "b": a, "c": 2 * a}
    row = {
        "key": key,
        "prompt": f"What is {a} + {a}?",
        "answer": str(2 * a),
        "text": text.format(**values) + "<eos>",
        "status": "done",
        "forced": 0,
        "stats": {"total_tokens": 100},
        "token_latency": latency,
        "forks": int("Parallel" in text),
    }
    return row | more


def test_only_finished_well_formed_right_and_new_trajectories_are_kept():
    lines = [
        line("good"),
        line("same up to blanks", BOXED.replace("Two parts.", "Two  parts.")),
        line("another problem", a=5),
        line("out of tokens", a=3, status="length"),
        line("closed by force", a=3, forced=1),
        line("broken", BOXED.replace("</Outlines>", ""), a=3),
        line("wrong", a=3, answer="7"),
        line("nothing said", " ", a=3),
    ]
    found = self_train_select(lines, ExactGrader(), end="<eos>")
    assert [row["id"] for row in found.rows] == ["good", "another problem"]
    assert found.rows[0]["text"] == BOXED.format(a=2, b=2, c=4)
    assert found.rows[0]["acceleration"] == pytest.approx(0.2)
    assert found.examples == {
        "not_finished": ["out of tokens"],
        "forced_closer": ["closed by force"],
        "format": ["broken"],
        "duplicate": ["same up to blanks"],
        "wrong_answer": ["wrong"],
        "ungraded": ["nothing said"],
    }
    assert sum(found.dropped.values()) + len(found.rows) == len(lines)


def test_a_wrong_answer_does_not_make_a_right_copy_of_the_text_a_duplicate_of_another_problem():
    found = self_train_select([line("a", a=2), line("b", a=2) | {"prompt": "2 and 2?"}], ExactGrader(), end="<eos>")
    assert [row["id"] for row in found.rows] == ["a", "b"]


def candidates(*groups: tuple[int, float, bool], problems: int = 10**6) -> list[Candidate]:
    made = []
    for count, acceleration, forked in groups:
        for _ in range(count):
            made.append(Candidate(f"k{len(made)}", f"p{len(made) % problems}", acceleration, forked))
    return made


def kept_per_group(found: list[Candidate], chosen: set[str]) -> Counter[float]:
    return Counter(c.acceleration for c in found if c.key in chosen)


def test_a_problem_keeps_a_spread_of_its_accelerations():
    found = candidates((10, 0.35, True), (10, 0.15, True), (10, 0.05, True), problems=1)
    chosen, surplus = balance(found, per_problem=5, max_bin_share=1.0)
    assert kept_per_group(found, chosen) == {0.35: 2, 0.15: 2, 0.05: 1}
    assert set(surplus.values()) == {"surplus_problem"}
    assert len(chosen) + len(surplus) == 30


@pytest.mark.parametrize(("sizes", "expected"), [((90, 20, 10), (30, 20, 10)), ((90, 0, 0), (90, 0, 0))])
def test_no_acceleration_holds_more_than_its_share_while_there_are_others(sizes, expected):
    places = (0.05, 0.15, 0.35)
    found = candidates(*((size, place, True) for size, place in zip(sizes, places, strict=True)))
    chosen, surplus = balance(found, max_bin_share=0.5)
    assert kept_per_group(found, chosen) == {p: n for p, n in zip(places, expected, strict=True) if n}
    assert set(surplus.values()) <= {"surplus_acceleration"}


def test_plain_text_stays_within_its_share():
    found = candidates((40, 0.15, True), (40, 0.0, False))
    chosen, surplus = balance(found, max_sequential_share=0.2)
    assert kept_per_group(found, chosen) == {0.15: 40, 0.0: 10}
    assert Counter(surplus.values()) == {"surplus_sequential": 30}
    assert len(balance(found, max_sequential_share=1.0)[0]) == 80


def test_the_choice_does_not_depend_on_the_order():
    found = candidates((30, 0.15, True), (9, 0.35, True), (30, 0.0, False), problems=7)
    assert balance(found, per_problem=3) == balance(found[::-1], per_problem=3)


def test_a_grader_in_threads_is_asked_once_a_trajectory():
    class Counting(ExactGrader):
        calls = 0

        def grade(self, response: str, answer: str) -> Grade:
            Counting.calls += 1
            return super().grade(response, answer)

    found = self_train_select((line(f"k{n}", a=n) for n in range(300)), Counting(), end="<eos>")
    assert (len(found.rows), Counting.calls) == (300, 300)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"per_problem": 0}, "per_problem must be at least 1, got 0"),
        ({"max_bin_share": 0.0}, r"max_bin_share must be in \(0, 1\], got 0.0"),
        ({"max_sequential_share": 1.5}, r"max_sequential_share must be in \[0, 1\], got 1.5"),
        ({"bins": (0.2, 0.1)}, r"bins must ascend, got \[0.2, 0.1\]"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        balance([], **options)
    with pytest.raises(ValueError, match="distinct keys"):
        balance(candidates((1, 0.1, True)) * 2)


def test_the_sequential_text_of_a_chain_counts_as_not_forked():
    found = self_train_select(
        [line("chain", CHAIN_TEXT + " \\boxed{{{c}}}", latency=100), line("fork", a=4)],
        ExactGrader(),
        end="<eos>",
        max_sequential_share=0.5,
    )
    assert [row["acceleration"] for row in found.rows] == pytest.approx([0.0, 0.2])
