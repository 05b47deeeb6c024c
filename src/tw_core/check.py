"""The format check: every way in which text or ids differ from SPEC section 1, with its place.

One set of rules runs over the span tree of `scanner`; text and token ids differ only in how they answer
"is this blank", "which number stands here" and "what does it look like" (`_Text`, `_Ids`).
Guarded by tests/core/test_check.py and the recorded format cases.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from tw_core._ids import as_ids
from tw_core._shapes import Int64
from tw_core.errors import TrieError
from tw_core.scanner import Span, id_tags, scan, text_tags
from tw_core.tags import CONCLUSION, LABEL, LABEL_IDS, OUTLINE, OUTLINES, PARALLEL, TAGS, THREAD, TagIds

Conclusions = Literal["optional", "required", "forbidden"]
Numbering = Literal["consecutive", "any"]

_THINK = re.compile("</?think>")


class Problem(NamedTuple):
    """One departure from the format.

    Attributes:
        offset: Where: characters into the text, or rows into the token ids.
        kind: "unclosed", "stray_tag", "missing", "gap", "number", "order", "conclusion", "nested", "think"
            or "canonical"; stable, for counting.
        expected: What should stand there.
        found: What stands there.
        message: The three in one sentence.
    """

    offset: int
    kind: str
    expected: str
    found: str
    message: str


class FormatReport(NamedTuple):
    """Result of a format check; true in a condition when `ok`.

    Attributes:
        ok: Whether there is no problem.
        problems: All problems, by offset.
    """

    ok: bool
    problems: tuple[Problem, ...]

    def __bool__(self) -> bool:
        return self.ok


def check_format(
    text: str,
    *,
    nested: bool = True,
    require_block: bool = False,
    allow_text_between_threads: bool = False,
    conclusion: Conclusions = "optional",
    numbering: Numbering = "consecutive",
    canonical: bool = False,
) -> FormatReport:
    """Lists everything in a text that is not well-formed fork/join text.

    Well-formed: every block is `<Parallel> <Outlines> (<Outline>n: ...</Outline>)+ </Outlines>
    (<Thread> n: ...</Thread>)+ [<Conclusion>...</Conclusion>] </Parallel>`; one thread per outline, in
    outline order, numbered 1..n; blank space between the parts, none between threads; no tag anywhere else.
    Text that is none of our tags (`<n>`, `a<b`) is plain text.

    Args:
        text: The response; tags that a prompt mentions would be problems.
        nested: Whether a thread may hold blocks (False: the paper's flat format).
        require_block: Whether a text without a block is a problem.
        allow_text_between_threads: Whether anything may stand between two threads and around a conclusion.
        conclusion: "optional"; "required": exactly one a block; "forbidden": none.
        numbering: "consecutive": 1..n, as training data has it; "any": what inference accepts, where a number
            that repeats an earlier one of its block counts once.
        canonical: Whether the white space around the tags must be the canonical bytes, which are those that
            inference injects or the paper's rendering has.
    Returns:
        The report; problems are sorted by offset.
    Raises:
        ValueError: `conclusion` or `numbering` is none of the above.
    """
    _check_options(conclusion, numbering)
    root = scan(text_tags(text), 0, len(text))
    rules = _Rules(_Text(text), nested, require_block, allow_text_between_threads, conclusion, numbering, canonical)
    return _report(rules, root)


def check_ids(
    token_ids: Any,
    tag_ids: TagIds,
    *,
    prompt_length: int = 0,
    nested: bool = True,
    require_block: bool = False,
    allow_text_between_threads: bool = False,
    conclusion: Conclusions = "optional",
    numbering: Numbering = "consecutive",
    canonical: bool = False,
) -> FormatReport:
    """`check_format` on token ids, without decoding; offsets are rows of `token_ids`.

    Args:
        token_ids: Shape (L,).
        tag_ids: Tags, colon, digits and newline, as `TagIds.from_tokenizer` knows them.
        prompt_length: Rows at the head that are not looked at.
        nested: As in `check_format`, like all further options.
        require_block: See `check_format`.
        allow_text_between_threads: See `check_format`.
        conclusion: See `check_format`.
        numbering: See `check_format`.
        canonical: See `check_format`.
    Returns:
        The report.
    Raises:
        TrieError: Ids that are negative or no integers, `prompt_length` outside 0..L.
        GrammarError: There are blocks and `tag_ids` lacks colon, digits or newline.
        ValueError: `conclusion` or `numbering` is none of those of `check_format`.
    """
    _check_options(conclusion, numbering)
    ids = as_ids(token_ids, "token_ids")
    if not 0 <= prompt_length <= len(ids):
        raise TrieError(f"prompt_length must be within 0..{len(ids)} (the length of token_ids), got {prompt_length}")
    root = scan(id_tags(ids, tag_ids, prompt_length), prompt_length, len(ids))
    source = _Ids(ids, tag_ids)
    rules = _Rules(source, nested, require_block, allow_text_between_threads, conclusion, numbering, canonical)
    return _report(rules, root)


def _check_options(conclusion: str, numbering: str) -> None:
    for name, value, known in (("conclusion", conclusion, Conclusions), ("numbering", numbering, Numbering)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}; correct the spelling")


def _report(rules: "_Rules", root: Span) -> FormatReport:
    problems = tuple(sorted((p for span in root.walk() for p in rules.span(span, root)), key=lambda p: p.offset))
    return FormatReport(not problems, problems)


@dataclass(frozen=True)
class _Text:
    """What the rules ask of a text."""

    text: str

    def blank(self, start: int, stop: int) -> bool:
        return not self.text[start:stop].strip()

    def equals(self, start: int, stop: int, glue: str) -> bool:
        return self.text[start:stop] == glue

    def number(self, span: Span) -> tuple[str | None, bool]:
        """The number at the head of an outline or thread, and whether its label has the canonical bytes."""
        match = LABEL.match(self.text, span.body, span.body_end)
        if not match:
            return None, False
        return match[2], match[1] == ("\n" if span.kind == THREAD else "") and match[3] == ":"

    def thinks(self, start: int, stop: int) -> Iterator[int]:
        return (match.start() for match in _THINK.finditer(self.text, start, stop))

    def show(self, start: int, stop: int) -> str:
        piece = self.text[start:stop]
        return repr(piece if len(piece) <= 40 else piece[:37] + "...")


@dataclass(frozen=True)
class _Ids:
    """The same answers for token ids."""

    ids: Int64[np.ndarray, " L"]
    tag_ids: TagIds

    def blank(self, start: int, stop: int) -> bool:
        return all(self.tag_ids.is_blank(token) for token in self.ids[start:stop].tolist())

    def equals(self, start: int, stop: int, glue: str) -> bool:
        return tuple(self.ids[start:stop].tolist()) == (self.tag_ids.join_newline if glue else ())

    def number(self, span: Span) -> tuple[str | None, bool]:
        head = self.ids[span.body : min(span.body_end, span.body + LABEL_IDS)].tolist()
        number = self.tag_ids.read_number(head)
        if number is None or span.kind == OUTLINE:
            return number, True  # outlines are the model's: any encoding of "1:" is as good
        label = self.tag_ids.label(number)
        return number, tuple(head[: len(label)]) == label

    def thinks(self, start: int, stop: int) -> Iterator[int]:
        return iter(())  # a think tag is no token of ours: only text shows it

    def show(self, start: int, stop: int) -> str:
        piece = self.ids[start:stop].tolist()
        return f"ids {piece}" if len(piece) <= 8 else f"ids {piece[:8]}..."


@dataclass(frozen=True)
class _Rules:
    """The rules of SPEC section 1 over one source; `span` yields the problems of one element."""

    source: _Text | _Ids
    nested: bool
    require_block: bool
    loose: bool
    conclusion: str
    numbering: str
    canonical: bool

    def span(self, span: Span, root: Span) -> Iterator[Problem]:
        for kind, at, end in span.strays:
            where = "outside every block" if span is root else f"inside {TAGS[span.kind]}"
            yield _problem(at, "stray_tag", f"no {TAGS[kind]} {where}", self.source.show(at, end))
        if not span.closed:
            found = "the end" if span.body_end == root.end else self.source.show(span.end, span.end + 12)
            yield _problem(
                span.end, "unclosed", f"{TAGS[span.kind + 1]} for the {TAGS[span.kind]} at {span.start}", found
            )
        if span.kind == PARALLEL:
            yield from self._block(span)
        elif span.kind == OUTLINES:
            yield from self._outlines(span)
        elif span.kind == THREAD and not self.nested:
            for block in span.children:
                yield _problem(block.start, "nested", "no block inside a thread (nested=False)", TAGS[PARALLEL])
        elif span is root:
            yield from self._root(span)

    def _root(self, root: Span) -> Iterator[Problem]:
        if self.require_block and not root.children:
            yield _problem(root.end, "missing", f"at least one {TAGS[PARALLEL]}", "no block")
        for block in root.children:
            for at in self.source.thinks(block.start, block.end):
                yield _problem(at, "think", "no think tag inside a block", self.source.show(at, at + 8))

    def _outlines(self, outlines: Span) -> Iterator[Problem]:
        if not outlines.children:
            yield _problem(outlines.body_end, "missing", f"at least one {TAGS[OUTLINE]}", "none")
        if self.canonical:
            yield from self._glue(outlines, [(OUTLINES, "\n"), (OUTLINE, "\n")])

    def _block(self, block: Span) -> Iterator[Problem]:
        groups, threads, conclusions = block.of(OUTLINES), block.of(THREAD), block.of(CONCLUSION)
        # What is missing in a cut-off block is told by "unclosed" alone.
        here = threads[0].start if threads else block.body_end
        if not groups:
            yield _problem(block.body, "missing", TAGS[OUTLINES], self.source.show(block.body, block.body + 12))
        for extra in groups[1:]:
            yield _problem(extra.start, "order", f"one {TAGS[OUTLINES]} a block", "another one")
        if not threads:
            yield _problem(here, "missing", f"at least one {TAGS[THREAD]}", self.source.show(here, here + 12))
        yield from self._numbers([outline for group in groups for outline in group.children], threads, block)
        wanted = {"required": "exactly one", "forbidden": "no"}.get(self.conclusion)
        if (self.conclusion == "required" and len(conclusions) != 1) or (
            self.conclusion == "forbidden" and conclusions
        ):
            at = conclusions[-1].start if conclusions else block.body_end
            yield _problem(at, "conclusion", f"{wanted} {TAGS[CONCLUSION]} in the block", f"{len(conclusions)}")
        yield from self._gaps(block)
        if self.canonical:
            yield from self._glue(block, [(PARALLEL, "\n"), (OUTLINES, "\n"), (THREAD, ""), (CONCLUSION, "\n")])

    def _numbers(self, outlines: list[Span], threads: list[Span], block: Span) -> Iterator[Problem]:
        numbers: list[str | None] = []  # of the threads that shall follow; None where the outline has none
        for place, outline in enumerate(outlines, 1):
            number, canonical = self.source.number(outline)
            head = self.source.show(outline.body, min(outline.body_end, outline.body + 12))
            if number is None:
                yield _problem(outline.body, "number", "a number and a colon after <Outline>", head)
            elif self.numbering == "consecutive" and number != str(place):
                yield _problem(outline.body, "number", f"outline number {place}", number)
            if number is not None and not canonical and self.canonical:
                yield _problem(outline.body, "canonical", f"'{number}:' right after <Outline>", head)
            if number is None or self.numbering == "consecutive" or number not in numbers:
                numbers.append(number)
        for place, thread in enumerate(threads):
            number, canonical = self.source.number(thread)
            head = self.source.show(thread.body, min(thread.body_end, thread.body + 12))
            expected = numbers[place] if place < len(numbers) else None
            if number is None:
                yield _problem(thread.body, "number", "a number and a colon after <Thread>", head)
            elif place >= len(numbers) and outlines:
                yield _problem(thread.start, "order", "no more threads than outlines", f"thread {number}")
            elif expected is not None and number != expected:
                yield _problem(thread.body, "order", f"thread {expected}, in outline order", f"thread {number}")
            if number is not None and not canonical and self.canonical:
                yield _problem(thread.body, "canonical", f"'\\n{number}:' right after <Thread>", head)
        if threads and len(threads) < len(numbers):
            at = threads[-1].end
            yield _problem(
                at, "missing", f"a thread for outline {numbers[len(threads)]}", self.source.show(at, at + 12)
            )

    def _gaps(self, block: Span) -> Iterator[Problem]:
        """What stands between the parts: blank, and between two threads nothing."""
        before, at = PARALLEL, block.body
        for child in block.children:
            between = before == THREAD and child.kind == THREAD
            if between and not self.loose and at != child.start:
                yield _problem(at, "gap", "<Thread> directly after </Thread>", self.source.show(at, child.start))
            elif not (self.loose and before >= THREAD) and not self.source.blank(at, child.start):
                yield _problem(
                    at, "gap", f"only white space before {TAGS[child.kind]}", self.source.show(at, child.start)
                )
            before, at = child.kind, child.end
        if block.closed and not (self.loose and before >= THREAD) and not self.source.blank(at, block.body_end):
            yield _problem(
                at, "gap", f"only white space before {TAGS[PARALLEL + 1]}", self.source.show(at, block.body_end)
            )

    def _glue(self, parent: Span, after: list[tuple[int, str]]) -> Iterator[Problem]:
        """Canonical bytes: `after` gives what follows each kind of part; a last thread is followed by a newline."""
        glue = dict(after)
        before, at = parent.kind, parent.body
        ends = [(child.kind, child.start, child.end) for child in parent.children]
        if parent.closed:
            ends.append((parent.kind + 1, parent.body_end, parent.end))
        for kind, start, end in ends:
            expected = "\n" if before == THREAD and kind != THREAD else glue[before]
            if not self.source.equals(at, start, expected):
                tag = TAGS[kind]
                yield _problem(at, "canonical", f"{expected!r} before {tag}", self.source.show(at, start))
            before, at = kind, end


def _problem(offset: int, kind: str, expected: str, found: str) -> Problem:
    return Problem(offset, kind, expected, found, f"at {offset}: expected {expected}, found {found}")
