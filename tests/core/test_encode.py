"""encode_units: the seams of inference, whatever the tokenizer merges across them."""

import pytest
from hypothesis import given, settings

from tests.support.trajectories import CharTokenizer, bpe_tokenizer, trajectories
from tw_core import TAGS, Block, GrammarError, TagIds, Trajectory, encode_units, extract_units, render

BPE = bpe_tokenizer()
TAGS_OF_BPE = TagIds.from_tokenizer(BPE)
CHAR = CharTokenizer()


def _encode(text: str) -> list[int]:
    return list(BPE.encode(text, add_special_tokens=False)) if text else []


def _expected(trajectory: Trajectory, prompt: str) -> list[tuple[list[int], list[int]]]:
    """The units by SPEC section 2, written from the tree: every piece encoded apart."""
    units: list[tuple[list[int], list[int]]] = []
    head = "\n<Outlines>"

    def chain(items: tuple[object, ...], context: list[int], lead: str, tail: str) -> list[int]:
        seen, text = list(context), lead
        for item in items:
            if isinstance(item, str):
                text += item
                continue
            assert isinstance(item, Block)
            whole = render(item)
            text += whole[: whole.index("</Outlines>") + len("</Outlines>")]
            assert head in text
            units.append((list(seen), _encode(text)))
            base = seen + _encode(text)
            joined = list(base)
            for place, thread in enumerate(item.threads):
                header = list(TAGS_OF_BPE.thread_header(str(place + 1), first=True))
                rest = (str(thread.items[0])[len(f"\n{place + 1}:") :], *thread.items[1:])
                own = chain(rest, base + header, "", "</Thread>")
                joined += own[len(base) + (0 if place == 0 else len(TAGS_OF_BPE.join_newline)) :]
            seen = joined + list(TAGS_OF_BPE.join_newline)
            text = (f"{render(item.conclusion)}\n" if item.conclusion else "") + "</Parallel>"
        text += tail
        if text:
            units.append((list(seen), _encode(text)))
        return seen + _encode(text)

    chain(trajectory.items, _encode(prompt), "", "")
    return units


@settings(deadline=None)
@given(trajectories())
def test_units_are_encoded_at_the_seams(trajectory: Trajectory) -> None:
    units = encode_units(render(trajectory), BPE, "Q: 1\n")
    assert [(u.context.tolist(), u.completion.tolist()) for u in units] == _expected(trajectory, "Q: 1\n")


@given(trajectories())
def test_without_merges_seams_do_not_matter(trajectory: Trajectory) -> None:
    text = render(trajectory)
    ids = CHAR.encode("Q" + text)
    assert encode_units(text, CHAR, "Q") == extract_units(ids, TagIds.from_tokenizer(CHAR), 1)


def test_merges_across_a_seam_would_give_other_ids() -> None:
    """Encoding the whole text in one piece, as the published SFT code does, trains ids that inference never meets."""
    text = render(Trajectory((Block.of(["a"], ["x"]),)))
    whole = BPE.encode(text, add_special_tokens=False)
    units = encode_units(text, BPE)
    assert list(units[-1].context) + list(units[-1].completion) != whole
    assert BPE.decode([*units[-1].context, *units[-1].completion]) == text


def test_white_space_between_the_parts_becomes_the_glue() -> None:
    loose = "<Parallel> <Outlines><Outline>1:a</Outline></Outlines> \n\n<Thread> 1 : x</Thread></Parallel>"
    *_, thread, join = encode_units(loose, CHAR)
    assert CHAR.decode(thread.context).endswith("</Outlines>\n<Thread>\n1:")
    assert CHAR.decode(thread.completion) == " x</Thread>"
    assert CHAR.decode(join.context).endswith("</Thread>\n")
    assert CHAR.decode(join.completion) == "</Parallel>"


def test_tags_in_the_prompt_are_text() -> None:
    (unit,) = encode_units("answer", CHAR, "Use <Parallel>, <Thread> and </Thread>.\n")
    assert CHAR.decode(unit.completion) == "answer"
    assert encode_units("", CHAR, "prompt") == []


def test_malformed_text_is_refused_with_every_problem() -> None:
    with pytest.raises(GrammarError, match=r"got 4 problems: at 0: .* no </Thread> .*; at 20: .*</Parallel>"):
        encode_units("</Thread><Parallel>x", CHAR)


def test_more_problems_than_fit_are_counted() -> None:
    with pytest.raises(GrammarError, match=r"got 20 problems: .*; and 12 more"):
        encode_units("</Thread>" * 20, CHAR)


def test_tag_ids_of_another_tokenizer_are_noticed() -> None:
    text = render(Trajectory((Block.of(["a"], ["x"]),)))
    mapping = {tag: place + 1 for place, tag in enumerate(TAGS)}
    other = TagIds.from_mapping(mapping, newline=110, colon=158, digits=range(200, 210))
    with pytest.raises(GrammarError, match=r"must fork into 3 units, got 1: tag_ids cannot read"):
        encode_units(text, CHAR, tag_ids=other)
