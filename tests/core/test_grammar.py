"""Parser and renderer: nothing is lost, nothing raises, canonical text has its tree."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.support.trajectories import tag_soups, trajectories
from tw_core import Block, Conclusion, Outline, Outlines, Thread, Trajectory, check_format, parse, render

CANONICAL = (
    "text\n<Parallel>\n<Outlines>\n<Outline>1: plan</Outline>\n<Outline>2: plan</Outline>\n</Outlines>\n"
    "<Thread>\n1: body\n</Thread><Thread>\n2: body\n</Thread>\n</Parallel>\ntext"
)


@given(st.one_of(trajectories(), trajectories(depth=1)))
def test_parse_is_the_inverse_of_render(trajectory: Trajectory) -> None:
    text = render(trajectory)
    assert parse(text) == trajectory
    assert render(parse(text)) == text


@given(st.one_of(st.text(), tag_soups), st.booleans())
def test_parse_never_raises_and_loses_nothing(text: str, nested: bool) -> None:
    assert render(parse(text, nested=nested)) == text


@given(trajectories(), st.floats(0, 1))
def test_a_prefix_is_an_unfinished_trajectory(trajectory: Trajectory, share: float) -> None:
    text = render(trajectory)
    cut = text[: int(len(text) * share)]
    parsed = parse(cut)
    assert render(parsed) == cut
    assert check_format(cut).ok == (not parsed.open_elements)


def test_the_spec_rendering_byte_for_byte() -> None:
    built = Trajectory(("text\n", Block.of(["plan", "plan"], ["body", "body"]), "\ntext"))
    assert render(built) == CANONICAL
    assert parse(CANONICAL) == built
    assert check_format(CANONICAL, canonical=True).ok


def test_a_block_shows_its_parts() -> None:
    inner = Block.of(["deep"], ["x"])
    (block,) = parse(render(Trajectory((Block.of(["a", "b"], ["one", ["two\n", inner]], "sum"),)))).blocks
    assert [(outline.number, outline.body) for outline in block.outlines] == [("1", " a"), ("2", " b")]
    assert [thread.number for thread in block.threads] == ["1", "2"]
    assert block.threads[0].body == " one\n"
    assert block.threads[1].blocks == (inner,)
    assert block.threads[1].body == f" two\n{render(inner)}\n"
    assert block.conclusion == Conclusion(("\nsum\n",))
    assert parse("<Parallel></Parallel>").blocks[0].conclusion is None
    assert Outline(("no number",)).number is None
    assert Outline(("no number",)).body == "no number"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", ()),
        ("a <n> b", ()),
        ("a<Parallel>", (Block,)),
        ("a<Parallel>\n<Outlines>\n<Outline>1: x", (Block, Outlines, Outline)),
        ("a<Parallel>\n<Outlines></Outlines>\n<Thread>\n1: x", (Block, Thread)),
        ("a<Parallel>\n<Thread>\n1: <Parallel><Thread>2", (Block, Thread, Block, Thread)),
        (CANONICAL[: CANONICAL.index("</Parallel>")], (Block,)),
        (CANONICAL, ()),
    ],
)
def test_open_elements_are_the_state_of_an_unfinished_trajectory(text: str, path: tuple[type, ...]) -> None:
    assert tuple(map(type, parse(text).open_elements)) == path


def test_lookalikes_are_plain_text() -> None:
    text = "<n> a<b <x> 1 < n > 2 </ Thread> <thread> <Thread <Parallel\n>"
    assert parse(text) == Trajectory((text,))
    assert check_format(text).ok


def test_flat_parse_leaves_blocks_in_threads_as_text() -> None:
    text = "<Parallel><Thread>1: <Parallel>x</Thread></Parallel>"
    (block,) = parse(text, nested=False).blocks
    assert block.threads == (Thread(("1: <Parallel>x",)),)
    assert render(parse(text, nested=False)) == text


def test_deep_nesting_needs_no_recursion() -> None:
    text = "<Parallel><Outlines></Outlines><Thread>" * 3000
    assert render(parse(text)) == text
    assert not check_format(text).ok


def test_block_of_wants_one_body_a_plan() -> None:
    with pytest.raises(ValueError, match=r"bodies must have one entry per plan \(2\), got 1"):
        Block.of(["a", "b"], ["x"])
