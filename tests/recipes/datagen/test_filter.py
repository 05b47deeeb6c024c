"""The last checks: what no annotator's reply can cause, but a mistake of ours could."""

import pytest

from tests.support.traces import traces
from tw_core import render
from tw_recipes.datagen.filter import acceleration, check_text
from tw_recipes.datagen.layout import assembled, bodies_of, response
from tw_recipes.datagen.models import Block, LineRange, OutlinedBlock
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.reasons import Reason, Rejected

LINES = Lines.of(traces(1)[0].reasoning)
THREADS = [LineRange(first_line=a, last_line=a + 5) for a in (1, 7, 13, 19)]
BLOCK = Block(number=1, threads=THREADS)
DONE = OutlinedBlock(**BLOCK.model_dump(), bodies=bodies_of(BLOCK, LINES), outlines=list("abcd"))
TEXT = render(assembled([DONE], LINES))


def test_the_text_as_it_was_put_together_passes():
    check_text(TEXT, [DONE], LINES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEXT.replace("</Outlines>", ""), Reason.FORMAT),
        (TEXT.replace("<Thread>\n2:", "<Thread>\n3:"), Reason.FORMAT),
        (TEXT.replace("</Thread><Thread>", "</Thread>\n<Thread>"), Reason.FORMAT),
        ("no block\n", Reason.FORMAT),
        (TEXT + "more", Reason.TEXT_CHANGED),
        (" " + TEXT, Reason.TEXT_CHANGED),
        (TEXT.replace("</Parallel>\n", "</Parallel>"), Reason.TEXT_CHANGED),
        (TEXT.replace("6300>6300", "6300>6301"), Reason.TEXT_CHANGED),
    ],
)
def test_any_other_text_does_not(text, reason):
    with pytest.raises(Rejected) as found:
        check_text(text, [DONE], LINES)
    assert found.value.reason == reason


def test_the_gain_is_what_the_longest_thread_leaves():
    lengths = [len(body) for body in DONE.bodies]
    text = response(TEXT, "\\boxed{1}")
    assert acceleration(text, [DONE]) == (sum(lengths) - max(lengths)) / len(text)
    assert acceleration(text, []) == 0
