"""Fork/join text as a tree of elements: one parser, one renderer (SPEC section 1).

    Trajectory ── text | Block ── text | Outlines ── text | Outline ── text
                                │ Thread ── text | Block ...
                                └ Conclusion ── text

Nothing is lost: what stands between elements is kept as text, so `render(parse(x)) == x` for every string,
well-formed, malformed or unfinished. `parse` never raises; `check_format` (tw_core.check) says what is wrong.
An unfinished trajectory is one whose last elements have closed=False: `open_elements` lists them.
Guarded by tests/core/test_grammar.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from tw_core.check import FormatReport, Problem, check_format
from tw_core.scanner import ROOT, scan, text_tags
from tw_core.tags import CONCLUSION, LABEL, OUTLINE, OUTLINES, PARALLEL, TAGS, THREAD

# The whole language of the format under one name; the check itself is in tw_core.check.
__all__ = [
    "TAGS",
    "Block",
    "Conclusion",
    "Element",
    "FormatReport",
    "Outline",
    "Outlines",
    "Problem",
    "Thread",
    "Trajectory",
    "check_format",
    "parse",
    "render",
]


@dataclass(frozen=True)
class Element:
    """A tag pair and what stands between, in order of appearance.

    Attributes:
        items: Text and elements. Tags that are no structure where they stand are part of the text.
        closed: Whether the closing tag is there.
    """

    items: "tuple[str | Element, ...]" = ()
    closed: bool = True
    kind: ClassVar[int] = ROOT

    @property
    def text(self) -> str:
        """Everything between the two tags, as text."""
        return "".join(_pieces(self.items))

    def _of(self, cls: "type[_E]") -> "tuple[_E, ...]":
        return tuple(item for item in self.items if isinstance(item, cls))


_E = TypeVar("_E", bound=Element)


class _Numbered(Element):
    @property
    def number(self) -> str | None:
        """The number before the first colon, None if there is none."""
        match = LABEL.match(self._head)
        return match[2] if match else None

    @property
    def body(self) -> str:
        """The text after "{number}:", with its blanks; all of it if there is no number."""
        match = LABEL.match(self._head)
        return self.text[match.end() :] if match else self.text

    @property
    def _head(self) -> str:
        return self.items[0] if self.items and isinstance(self.items[0], str) else ""


class Outline(_Numbered):
    """The plan of one thread: `<Outline>1: plan</Outline>`."""

    kind = OUTLINE

    @classmethod
    def of(cls, number: str, plan: str) -> "Outline":
        """Builds the canonical outline of a number and a plan."""
        return cls((f"{number}: {plan}",))


class Outlines(Element):
    """The plans of a block: `<Outlines>` to `</Outlines>`."""

    kind = OUTLINES

    @property
    def outlines(self) -> tuple[Outline, ...]:
        """The outlines, in order."""
        return self._of(Outline)


class Thread(_Numbered):
    """One branch of a block: `<Thread>\\n1: body\\n</Thread>`; the body may hold blocks."""

    kind = THREAD

    @classmethod
    def of(cls, number: str, *body: "str | Block") -> "Thread":
        """Builds the canonical thread of a number and its text and blocks."""
        return cls(_merged([f"\n{number}: ", *body, "\n"]))

    @property
    def blocks(self) -> "tuple[Block, ...]":
        """The blocks directly inside this thread."""
        return self._of(Block)


class Conclusion(Element):
    """The optional summary after the last thread of a block."""

    kind = CONCLUSION


class Block(Element):
    """One fork and join: `<Parallel>` to `</Parallel>`."""

    kind = PARALLEL

    @classmethod
    def of(
        cls,
        plans: Sequence[str],
        bodies: "Sequence[str | Sequence[str | Block]]",
        conclusion: str | None = None,
    ) -> "Block":
        """Builds the canonical block, numbered 1..n.

        Args:
            plans: One plan a thread, without its number.
            bodies: One body a thread, without header and closing newline: a string, or text and blocks.
            conclusion: The join summary, None for none.
        Raises:
            ValueError: There are not as many bodies as plans.
        """
        if len(plans) != len(bodies):
            raise ValueError(f"bodies must have one entry per plan ({len(plans)}), got {len(bodies)}; pair them up")
        outlines: list[str | Element] = ["\n"]
        threads: list[str | Element] = []
        for number, (plan, body) in enumerate(zip(plans, bodies, strict=True), 1):
            outlines += [Outline.of(str(number), plan), "\n"]
            threads.append(Thread.of(str(number), *([body] if isinstance(body, str) else body)))
        summary: list[str | Element] = [] if conclusion is None else [Conclusion((f"\n{conclusion}\n",)), "\n"]
        return cls(_merged(["\n", Outlines(tuple(outlines)), "\n", *threads, "\n", *summary]))

    @property
    def outlines(self) -> tuple[Outline, ...]:
        """The outlines of the block, in order."""
        return tuple(outline for group in self._of(Outlines) for outline in group.outlines)

    @property
    def threads(self) -> tuple[Thread, ...]:
        """The threads of the block, in order."""
        return self._of(Thread)

    @property
    def conclusion(self) -> Conclusion | None:
        """The first conclusion of the block, if it has one."""
        return next(iter(self._of(Conclusion)), None)


@dataclass(frozen=True)
class Trajectory(Element):
    """Fork/join text: plain text and blocks. `Trajectory((text, block, text))` builds one."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The outermost blocks, in order."""
        return self._of(Block)

    @property
    def open_elements(self) -> tuple[Element, ...]:
        """The elements still open at the end, outermost first: the state of an unfinished trajectory.

        Empty for a finished one; (Block, Thread) inside a thread, (Block,) between threads.
        """
        path: list[Element] = []
        element: Element = self
        while element.items and isinstance(last := element.items[-1], Element) and not last.closed:
            path.append(element := last)
        return tuple(path)


_CLASSES: dict[int, type[Element]] = {
    ROOT: Trajectory,
    PARALLEL: Block,
    OUTLINES: Outlines,
    OUTLINE: Outline,
    THREAD: Thread,
    CONCLUSION: Conclusion,
}


def parse(text: str, *, nested: bool = True) -> Trajectory:
    """Reads any text as a trajectory; the inverse of `render`.

    Args:
        text: Fork/join text, finished or not, well-formed or not.
        nested: Whether <Parallel> inside a thread opens a block (False: the paper's flat format, where it is text).
    Returns:
        The trajectory. It never raises on a string: what is no structure stays text.
    """
    root = scan(text_tags(text), 0, len(text), nested=nested)
    built: dict[int, Element] = {}
    for span in reversed(list(root.walk())):  # children before their parents
        items: list[str | Element] = []
        at = span.body
        for child in span.children:
            items += [text[at : child.start], built.pop(id(child))]
            at = child.end
        items.append(text[at : span.body_end])
        built[id(span)] = _CLASSES[span.kind](tuple(item for item in items if item != ""), span.closed)
    trajectory = built[id(root)]
    assert isinstance(trajectory, Trajectory)
    return trajectory


def render(trajectory: Element) -> str:
    """Writes a trajectory (or one element of it) as text; an open element gets no closing tag."""
    return "".join(_pieces((trajectory,)))


def _pieces(items: "Sequence[str | Element]") -> list[str]:
    """The strings of a list of items, without recursion: nesting may be deeper than Python's stack."""
    pieces: list[str] = []
    stack: list[str | Element] = list(reversed(items))
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            pieces.append(item)
            continue
        if item.kind != ROOT:
            pieces.append(TAGS[item.kind])
            if item.closed:
                stack.append(TAGS[item.kind + 1])
        stack.extend(reversed(item.items))
    return pieces


def _merged(items: "Sequence[str | Element]") -> "tuple[str | Element, ...]":
    """The items with neighbouring strings joined, as `parse` returns them."""
    merged: list[str | Element] = []
    for item in items:
        if isinstance(item, str) and merged and isinstance(merged[-1], str):
            merged[-1] += item
        elif item != "":
            merged.append(item)
    return tuple(merged)
