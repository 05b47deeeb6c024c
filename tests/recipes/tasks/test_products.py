"""The sum of products: its laws hold for every problem, its texts are what they claim, its splits never meet."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.arithmetic import holds_true_equations
from tw_core import TagIds, check_format, encode_units, parallel_stats, parse, render
from tw_recipes.tasks import TASKS, SumOfProducts, get_task

TASK = SumOfProducts()
TOKENIZER = TASK.tokenizer()
STYLES = ("sequential", "forkjoin")


def _backwards(digits: str) -> int:
    return int(digits[::-1])


def _work(text: str) -> list[str]:
    """The solution's own lines: tags, outlines and numbers of threads taken away."""
    text = re.sub(r"<Outlines>.*</Outlines>\n", "", text, flags=re.DOTALL)
    text = re.sub(r"</Thread>(<Thread>\n)?|<Thread>\n|</?Parallel>\n?", "", text)
    return [line for line in text.split("\n") if line]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 3, 4]), st.sampled_from(["train", "test"]))
def test_the_work_is_right_and_both_styles_have_it(seed: int, terms: int, split: str) -> None:
    task = SumOfProducts(terms)
    factors = task.problems(3, seed=seed, split=split)
    rows = {style: task.rows(3, seed=seed, split=split, style=style) for style in STYLES}
    for i, pairs in enumerate(factors.tolist()):
        one, two = rows["sequential"][i], rows["forkjoin"][i]
        assert (one["prompt"], one["answer"]) == (two["prompt"], two["answer"])
        assert _work(one["text"]) == _work(two["text"])
        asked = [
            f"{term}w{a % 10}{term}x{a // 10} boxes of {term}y{b % 10}{term}z{b // 10}"
            for term, (a, b) in enumerate(pairs, start=1)
        ]
        assert [item.rsplit(" ", 1)[0] for item in one["prompt"].split(": how")[0].split(", ")] == asked
        assert _backwards(one["answer"]) == sum(a * b for a, b in pairs)
        assert one["text"].endswith("</think>\n\n\\boxed{" + one["answer"] + "}")
        lines = iter(_work(one["text"]))
        assert next(lines) == "<think>"
        for term, (a, b) in enumerate(pairs, start=1):
            assert next(lines) == f"{term}: {asked[term - 1].replace(' boxes of ', '*')}"
            total = 0
            for _ in range(4):
                x, y, shifted, running = re.split(r"[*=>]", next(lines))
                total += _backwards(shifted)
                assert str(int(x) * int(y)) == str(_backwards(shifted)).rstrip("0") or int(x) * int(y) % 10 == 0
                assert _backwards(running) == total
            assert total == a * b
            labelled = re.findall(rf"{term}([a-d])(\d)", next(lines))
            assert [place for place, _ in labelled] == list("abcd")
            assert _backwards("".join(digit for _, digit in labelled)) == a * b
        running = 0
        for p, place in enumerate("abcd"):
            running //= 10
            line, found = next(lines).split(f"5{place}")
            entries = re.findall(r"(\d)([a-d])(\d)(\d\d)", line)
            assert [(int(term), at) for term, at, _, _ in entries] == [(t, place) for t in range(1, terms + 1)]
            for (_, _, digit, written), (a, b) in zip(entries, pairs, strict=True):
                assert int(digit) == a * b // 10**p % 10
                running += int(digit)
                assert _backwards(written) == running
            assert found == one["answer"][p]
        assert re.sub("5[a-d]", "", next(lines)) == one["answer"]


def test_fork_join_texts_have_the_format_and_sequential_ones_no_block() -> None:
    for row in TASK.rows(20, seed=1, style="forkjoin"):
        assert check_format(row["text"], require_block=True, canonical=True).problems == ()
        assert render(parse(row["text"])) == row["text"]
        assert row["text"].count("<Thread>") == 4
    for row in TASK.rows(20, seed=1, style="sequential"):
        assert check_format(row["text"]).ok
        assert "<Parallel>" not in row["text"]


def test_every_text_of_a_style_has_one_length_and_forking_shortens_the_path() -> None:
    lengths = {
        style: {len(TOKENIZER.encode(row["text"])) for row in TASK.rows(50, seed=2, style=style)} for style in STYLES
    }
    assert lengths == {"sequential": {415}, "forkjoin": {472}}
    ids = TOKENIZER.encode(TASK.rows(1, seed=2)[0]["text"])
    stats = parallel_stats(ids, TagIds.from_tokenizer(TOKENIZER))
    assert (stats.num_blocks, stats.num_threads, stats.critical_path_tokens) == (1, 4, 232)
    assert 415 / stats.critical_path_tokens > 1.6


def test_tokenizer_is_one_to_one_and_knows_every_character() -> None:
    for style in STYLES:
        for row in TASK.rows(20, seed=3, style=style):
            for text in (row["prompt"], row["text"], row["answer"]):
                ids = TOKENIZER.encode(text)
                assert TOKENIZER.unk_token_id not in ids
                assert TOKENIZER.decode(ids) == text
    row = TASK.rows(1, seed=3)[0]
    whole = TOKENIZER.encode(row["prompt"] + row["text"])
    joined = max(encode_units(row["text"], TOKENIZER, prompt=row["prompt"]), key=lambda unit: len(unit.context))
    np.testing.assert_array_equal(np.concatenate([*joined]), whole)  # training ids are the ids of the text


def test_splits_never_share_a_problem_and_streams_are_stable() -> None:
    seen: dict[str, set[tuple[int, ...]]] = {}
    for split in ("train", "test"):
        drawn = [TASK.problems(4000, seed=seed, split=split) for seed in range(3)]
        seen[split] = {tuple(problem.ravel().tolist()) for part in drawn for problem in part}
        assert len(seen[split]) == 12_000  # no repeats either
        np.testing.assert_array_equal(TASK.problems(7, seed=1, split=split), drawn[1][:7])
    assert not seen["train"] & seen["test"]
    whole = TASK.rows(30, seed=4)
    assert TASK.rows(10, seed=4, offset=20) == whole[20:]
    assert TASK.rows(30, seed=5) != whole


def test_with_few_terms_a_problem_still_has_one_split() -> None:
    # 10^8 possible problems only; of a hash that looked at part of the factors some would be in both.
    task = SumOfProducts(2)
    train, test = (task.problems(20_000, seed=0, split=split).reshape(-1, 4) for split in ("train", "test"))
    assert not set(map(tuple, train.tolist())) & set(map(tuple, test.tolist()))


def test_grader_reads_the_box_after_the_reasoning_only() -> None:
    grader, row = TASK.grader(), TASK.rows(1, seed=6)[0]
    answer = row["answer"]
    wrong = answer[:-1] + str((int(answer[-1]) + 1) % 10)
    assert grader.grade(row["text"], answer).correct
    assert grader.grade(row["text"] + "<eos>", answer).correct
    assert not grader.grade(row["text"], wrong).correct
    assert not grader.grade(row["text"].replace("\\boxed{" + answer, "\\boxed{" + wrong), answer).correct
    assert not grader.grade("<think>\n\\boxed{" + answer + "}\n</think>\n\n\\boxed{" + wrong + "}", answer).correct
    assert not grader.grade("", answer).correct


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 3, 4]), st.sampled_from(STYLES))
def test_plain_texts_hold_true_equations(seed: int, terms: int, style: str) -> None:
    task = SumOfProducts(terms)
    factors = task.problems(2, seed=seed)
    for row, pairs in zip(task.rows(2, seed=seed, style=style, plain=True), factors.tolist(), strict=True):
        assert check_format(row["text"], canonical=True, require_block=style == "forkjoin").problems == ()
        assert int(row["answer"]) == sum(a * b for a, b in pairs)
        assert task.grader().grade(row["text"], row["answer"]).correct
        assert [(int(a), int(b)) for a, b in re.findall(r"(\d+) boxes of (\d+)", row["prompt"])] == [*map(tuple, pairs)]
        holds_true_equations(row["text"])


def test_registry_and_arguments() -> None:
    assert get_task("products") is TASKS["products"]
    assert get_task("products", terms=3) == SumOfProducts(3)
    with pytest.raises(KeyError, match="task must be one of products, multiply, adaptive, got 'sums'"):
        get_task("sums")
    with pytest.raises(ValueError, match="terms must be 2, 3 or 4, got 5"):
        SumOfProducts(5)
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'dev\''):
        TASK.problems(1, seed=0, split="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        TASK.rows(0, seed=0)
    with pytest.raises(ValueError, match="style must be"):
        TASK.rows(1, seed=0, style="tree")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offset must be at least 0"):
        TASK.rows(1, seed=0, offset=-1)
