"""Numbered lines and layout: nothing is lost, whatever the text and the proposal."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_core import check_format, render
from tw_recipes.datagen.layout import assembled, bodies_of, disjoint, outside, placed, restored
from tw_recipes.datagen.models import LineRange, OutlinedBlock
from tw_recipes.datagen.numbering import Lines, quoted
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.reasons import Reason, Rejected

FREE = StageOptions(min_saving=0)
# Line separators of Unicode, form feeds and carriage returns are text; so is almost a tag.
TEXT = st.text(alphabet="ab 1:<>\n\n\n\r\t\x0b\x0c\u2028\u0085é𝔸", max_size=120)
RANGES = st.lists(st.tuples(st.integers(-1, 30), st.integers(-1, 30)), max_size=4)


def ranges(*pairs: tuple[int, int]) -> list[LineRange]:
    return [LineRange(first_line=first, last_line=last) for first, last in pairs]


def outlined(block, lines) -> OutlinedBlock:
    plans = [f"part {n}" for n in range(len(block.threads))]
    return OutlinedBlock(**block.model_dump(), bodies=bodies_of(block, lines), outlines=plans)


@given(TEXT)
def test_lines_give_back_their_text_and_only_line_feeds_end_them(text):
    lines = Lines.of(text)
    assert "".join(lines.lines) == text
    assert lines.text(1, len(lines)) == text
    assert all("\n" not in line[:-1] for line in lines.lines)
    assert len(lines) == text.count("\n") + (not text.endswith("\n") and text != "")
    assert len(lines.numbered().split("\n")) == max(len(lines), 1)


def test_numbered_lines_cannot_imitate_each_other():
    lines = Lines.of("one\nL7| seven\n")
    assert lines.numbered() == "L1| one\nL2| L7| seven"
    assert quoted("one\n\nTask: steps") == "> one\n> \n> Task: steps"


@given(TEXT, RANGES, RANGES)
def test_text_outside_of_blocks_stays_and_threads_give_back_their_lines(text, first, second):
    lines, found = Lines.of(text), []
    for number, proposal in enumerate((first, second), 1):
        with suppress(Rejected):
            found.append(placed(number, ranges(*proposal), lines, FREE)[0])
    blocks, overlapping = disjoint(found)
    assert len(blocks) + len(overlapping) == len(found)
    fork_join = render(assembled([outlined(block, lines) for block in blocks], lines))
    # Without edits the threads are their lines; only blank lines between two threads have no place in the format.
    expected, at = "", 1
    for block in blocks:
        spans = [(thread.first_line, thread.last_line) for thread in block.threads]
        assert all(lines.lines[a - 1].strip() and lines.lines[b - 1].strip() for a, b in spans)
        expected += lines.text(at, spans[0][0] - 1) + "".join(lines.text(a, b) for a, b in spans)
        at = spans[-1][1] + 1
    expected += lines.text(at, len(lines))
    assert restored(fork_join) == expected
    kept = [line for line in text.split("\n") if line.strip()]
    assert [line for line in expected.split("\n") if line.strip()] == kept
    assert sum(map(len, outside(blocks, lines))) == len(text) - sum(
        len(lines.text(block.threads[0].first_line, block.threads[-1].last_line)) for block in blocks
    )
    if blocks:
        assert check_format(fork_join, nested=False, canonical=True, require_block=True)


def test_blank_edges_stay_outside_and_a_last_line_without_a_feed_gets_none():
    lines = Lines.of("head\n\na1\na2\n\n \nb1\n\ntail")
    block, repairs = placed(1, ranges((3, 5), (6, 8)), lines, FREE)
    assert repairs == 0
    assert bodies_of(block, lines) == ["a1\na2", "b1"]
    assert outside([block], lines) == ["head\n\n", "\ntail"]
    last, _ = placed(1, ranges((3, 4), (9, 9), (7, 7)), lines, FREE)
    assert render(assembled([outlined(last, lines)], lines)).endswith("3: tail\n</Thread>\n</Parallel>")


@pytest.mark.parametrize(
    ("proposal", "reason"),
    [
        (((12, 14), (1, 2)), Reason.BLOCK_RANGE),
        (((-3, 0), (2, 3)), Reason.BLOCK_RANGE),
        (((1, 2),), Reason.BLOCK_FEW_THREADS),
        (((1, 2), (4, 4)), Reason.BLOCK_FEW_THREADS),
        (((1, 2), (2, 3)), Reason.BLOCK_OVERLAP),
        (((1, 1), (3, 3)), Reason.BLOCK_GAP),
        (((1, 1), (2, 2), (3, 3)), Reason.BLOCK_MANY_THREADS),
        (((1, 2), (3, 3)), Reason.BLOCK_SAVING),
    ],
)
def test_proposals_that_make_no_block(proposal, reason):
    lines = Lines.of("aaa\nbbb\nccc\n\n")
    with pytest.raises(Rejected) as found:
        placed(1, ranges(*proposal), lines, StageOptions(max_threads=2, min_saving=4))
    assert found.value.reason == reason


def test_ranges_that_are_put_right_are_counted():
    lines = Lines.of("a\nb\nc\nd\n")
    block, repairs = placed(1, ranges((2, 1), (3, 9)), lines, FREE)
    assert [(t.first_line, t.last_line) for t in block.threads] == [(1, 2), (3, 4)]
    assert repairs == 2
    block, repairs = placed(1, ranges((1, 2), (3, 4), (7, 8)), lines, FREE)
    assert [(t.first_line, t.last_line) for t in block.threads] == [(1, 2), (3, 4)]
    assert repairs == 1
