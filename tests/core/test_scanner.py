"""The state machine: what closes what, and which tags stay text, the same on text and on ids."""

import numpy as np
import pytest
from hypothesis import given

from tests.support.trajectories import CharTokenizer, tag_soups
from tw_core import TAGS, TagIds
from tw_core.scanner import ROOT, Span, id_tags, scan, text_tags

CHAR = CharTokenizer()
CHAR_TAGS = TagIds.from_tokenizer(CHAR)
SHORT = {"P": "Parallel", "S": "Outlines", "O": "Outline", "T": "Thread", "C": "Conclusion"}
LETTER = {name: letter for letter, name in SHORT.items()}


def _tags(text: str) -> str:
    """ "P S O /O" -> the tags of these letters."""
    return "".join(f"<{'/' if '/' in word else ''}{SHORT[word.strip('/')]}>" for word in text.split())


def _shape(span: Span) -> str:
    """A span as letters: P(...) closed, P[...] not closed; strays as lower-case letters."""
    parts = [(child.start, _shape(child)) for child in span.children]
    parts += [(at, TAGS[kind].strip("<>")) for kind, at, _ in span.strays]
    parts = [(at, LETTER[p.strip("/")].lower() if p.strip("/") in LETTER else p) for at, p in parts]
    body = " ".join(part for _, part in sorted(parts))
    if span.kind == ROOT:
        return body
    letter = LETTER[TAGS[span.kind].strip("<>")]
    return f"{letter}({body})" if span.closed else f"{letter}[{body}]"


@pytest.mark.parametrize(
    ("tags", "shape"),
    [
        ("P S O /O O /O /S T /T T /T C /C /P", "P(S(O() O()) T() T() C())"),
        ("P T P T /T /P /T /P", "P(T(P(T())))"),
        ("P T P T /T /T /P", "P(T(P[T()]))"),  # a thread ends at its first closer outside inner threads
        ("P T P S O /T /P", "P(T(P[S[O[]]]))"),
        ("P S O T /T /P", "P(S[O[]] T())"),  # a thread ends what was open before it
        ("P C T /T /P", "P(c T())"),  # no conclusion before the threads
        ("P T /T C T /T /P", "P(T() C[] T())"),
        ("P S O O /O /S /P", "P(S(O[] O()))"),
        ("P S O /S /P", "P(S(O[]))"),
        ("P T /T S /S /P", "P(T() s s)"),  # no outlines after a thread
        ("P P /P /P", "P(p) p"),  # a block directly inside a block is text
        ("P T /P /T /P", "P(T(p))"),  # a block is not closed from inside a thread
        ("P T T /T /T /P", "P(T(t) t)"),
        ("/P P", "p P[]"),
        ("S O /O /S T /T C /C", "s o o s t t c c"),
    ],
)
def test_rules(tags: str, shape: str) -> None:
    text = _tags(tags)
    assert _shape(scan(text_tags(text), 0, len(text))) == shape


def test_flat_format_keeps_blocks_in_threads_as_text() -> None:
    text = _tags("P T P T /T /P")
    assert _shape(scan(text_tags(text), 0, len(text), nested=False)) == "P(T(p t))"


@given(tag_soups)
def test_text_and_ids_have_the_same_tree(text: str) -> None:
    ids = np.array(CHAR.encode(text), dtype=np.int64)
    from_text = scan(text_tags(text), 0, len(text))
    from_ids = scan(id_tags(ids, CHAR_TAGS), 0, len(ids))
    assert _shape(from_ids) == _shape(from_text)


@given(tag_soups)
def test_spans_nest_and_keep_their_order(text: str) -> None:
    for span in scan(text_tags(text), 0, len(text)).walk():
        assert span.start <= span.body <= span.body_end <= span.end
        borders = [span.body, *(edge for child in span.children for edge in (child.start, child.end)), span.body_end]
        assert borders == sorted(borders)
