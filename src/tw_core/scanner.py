"""The one state machine of the format: tag positions in, a tree of spans out. Text and token ids share it.

A piece source finds the tags (`text_tags` in characters, `id_tags` in token ids); `scan` never looks at what
stands between them. It never fails: a tag that cannot be structure where it stands is kept as a stray
(plain text), an element that is not closed ends where its parent ends. Rules, by the innermost open element:

    text (top level, thread)   <Parallel> opens a block; </Thread> closes the thread
    block                      <Outlines>, <Outline>, <Conclusion> and their closers in their places;
                               <Thread> opens a thread and ends unclosed outlines or conclusions;
                               </Parallel> closes the block; </Thread> closes the thread around the block

so a thread ends at its first </Thread> outside nested threads, whatever it left open, as the engine's stop
token ends it. Guarded by tests/core/test_scanner.py and the golden statistics.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tw_core._shapes import Int64
from tw_core.tags import CONCLUSION, OUTLINE, OUTLINES, PARALLEL, TAGS, THREAD, TagIds

ROOT = -1
"""Kind of the span around everything."""

Tag = tuple[int, int, int]
"""A tag in the input: place in TAGS, first offset, one past the last offset."""

_TAG = re.compile("|".join(map(re.escape, TAGS)))
_PLACE = {tag: place for place, tag in enumerate(TAGS)}


@dataclass(slots=True, eq=False)
class Span:
    """One element of the format, as offsets into the text or the ids it was scanned from.

    Attributes:
        kind: Place of its opening tag in `TAGS`, or ROOT.
        start: Offset of the opening tag.
        body: First offset after the opening tag.
        body_end: Offset of the closing tag; where it was cut if it is not closed.
        end: One past the closing tag; equal to `body_end` if it is not closed.
        closed: Whether its own closing tag ended it.
        children: Elements directly inside, in order.
        strays: Tags directly inside that are no structure there, in order.
    """

    kind: int
    start: int
    body: int
    body_end: int = -1
    end: int = -1
    closed: bool = False
    children: list["Span"] = field(default_factory=list)
    strays: list[Tag] = field(default_factory=list)

    def of(self, kind: int) -> list["Span"]:
        """The children of one kind, in order."""
        return [child for child in self.children if child.kind == kind]

    def walk(self) -> Iterator["Span"]:
        """This span and everything below it, parents first, in order of appearance."""
        stack = [self]
        while stack:
            span = stack.pop()
            yield span
            stack.extend(reversed(span.children))


def text_tags(text: str) -> Iterator[Tag]:
    """The tags of a text, offsets in characters."""
    return ((_PLACE[match[0]], match.start(), match.end()) for match in _TAG.finditer(text))


def id_tags(ids: Int64[np.ndarray, " L"], tag_ids: TagIds, start: int = 0) -> Iterator[Tag]:
    """The tags among token ids from row `start` on, offsets in ids."""
    known = np.array([tag for tag in tag_ids.ids if tag is not None], dtype=np.int64)
    order = np.argsort(known)
    ranked = known[order]
    tail = ids[start:]
    near = np.flatnonzero((tail >= ranked[0]) & (tail <= ranked[-1]))
    values = tail[near]
    slots = np.searchsorted(ranked, values)
    exact = ranked[slots] == values
    places = order[slots[exact]].tolist()
    rows = (near[exact] + start).tolist()
    return ((place, row, row + 1) for place, row in zip(places, rows, strict=True))


def scan(tags: Iterable[Tag], start: int, stop: int, *, nested: bool = True) -> Span:
    """Builds the tree of spans over [start, stop).

    Args:
        tags: The tags inside [start, stop), in order.
        start: First offset.
        stop: One past the last offset.
        nested: Whether <Parallel> inside a thread opens a block (False: the paper's flat format).
    Returns:
        The ROOT span; open elements at the end of the input have closed=False and end at `stop`.
    """
    root = Span(ROOT, start, start, stop, stop, True)
    stack = [root]

    def push(kind: int, at: int, body: int) -> None:
        span = Span(kind, at, body)
        stack[-1].children.append(span)
        stack.append(span)

    def close(at: int, end: int) -> None:
        span = stack.pop()
        span.body_end, span.end, span.closed = at, end, True

    def cut_to(kind: int, at: int) -> None:
        while stack[-1].kind != kind:
            span = stack.pop()
            span.body_end = span.end = at

    for kind, at, end in tags:
        top = stack[-1]
        if top.kind in (ROOT, THREAD):
            if kind == PARALLEL and (nested or top is root):
                push(kind, at, end)
            elif kind == THREAD + 1 and top.kind == THREAD:
                close(at, end)
            else:
                top.strays.append((kind, at, end))
            continue
        # Inside a block: it is the innermost open element, or its outlines, outline or conclusion is.
        level = next(i for i in range(len(stack) - 1, 0, -1) if stack[i].kind == PARALLEL)
        block = stack[level]
        if kind == PARALLEL + 1:
            cut_to(PARALLEL, at)
            close(at, end)
        elif kind == THREAD + 1 and stack[level - 1].kind == THREAD:
            cut_to(THREAD, at)
            close(at, end)
        elif kind == THREAD:
            cut_to(PARALLEL, at)
            push(kind, at, end)
        elif top is block and kind in (OUTLINES, CONCLUSION) and (kind == CONCLUSION) == bool(block.of(THREAD)):
            push(kind, at, end)  # outlines before the threads, conclusions after
        elif kind == OUTLINE and top.kind in (OUTLINES, OUTLINE):
            cut_to(OUTLINES, at)
            push(kind, at, end)
        elif kind == OUTLINES + 1 and top.kind in (OUTLINES, OUTLINE):
            cut_to(OUTLINES, at)
            close(at, end)
        elif kind == top.kind + 1:
            close(at, end)
        else:
            top.strays.append((kind, at, end))
    cut_to(ROOT, stop)
    return root
