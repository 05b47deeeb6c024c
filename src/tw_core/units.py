"""Units: what the engine saw and what it wrote (SPEC section 2).

`extract_units` replays the inference state machine (SPEC section 4) over finished ids: a fork stands where
the engine would have forked, at a </Outlines> that closes fresh numbered outlines and is followed by the
injected header of their first number. The tree of `scanner` says what the format is; this says which call
wrote which token. They agree on every well-formed trajectory (tests/core/test_units.py); on malformed ids
this one alone counts, since loss falls on what a call wrote.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tw_core._ids import as_ids
from tw_core._shapes import Int64
from tw_core.errors import TrieError
from tw_core.scanner import Tag, id_tags
from tw_core.tags import LABEL_IDS, OUTLINE, OUTLINES, THREAD, Ids, TagIds


@dataclass(frozen=True, eq=False)
class Unit:
    """One engine call: the ids it was given and the ids it returned.

    Iterates as a pair, `context, completion = unit`; equal by value; arrays may share memory with the ids
    they were cut from, so treat them as read-only.

    Attributes:
        context: Shape (C,), int64. Anything array-like is accepted and converted.
        completion: Shape (G,), int64.
    Raises:
        TrieError: Ids that are not integers, are negative, or not one-dimensional.
    """

    context: Int64[np.ndarray, " C"]
    completion: Int64[np.ndarray, " G"]

    def __init__(self, context: Any, completion: Any) -> None:
        object.__setattr__(self, "context", as_ids(context, "context"))
        object.__setattr__(self, "completion", as_ids(completion, "completion"))

    def __iter__(self) -> Iterator[Int64[np.ndarray, " L"]]:
        return iter((self.context, self.completion))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Unit):
            return NotImplemented
        return np.array_equal(self.context, other.context) and np.array_equal(self.completion, other.completion)

    def __hash__(self) -> int:
        return hash((self.context.tobytes(), self.completion.tobytes()))


def extract_units(token_ids: Any, tag_ids: TagIds, prompt_length: int, *, nested: bool = True) -> list[Unit]:
    """Cuts a joined trajectory into the engine calls that wrote it.

    Order of calls: sequential, the threads of the block in outline order (each with its own blocks inside),
    then the sequential call after the join. The context of every thread ends in "\\n<Thread>\\n{k}:", also
    where the joined ids hold a later thread directly after "</Thread>".

    Every input has a defined result, and each token after the prompt is in one completion or is glue:

    - tags inside the prompt are text;
    - outlines without a number, closed twice, or not followed by the exact header of their first number do
      not fork: the ids go on as sequential text, all of them the model's;
    - a thread whose header is not the exact one of the next outline is not taken as one: the join is there;
    - a thread that is not closed goes on to the end of the ids, a header cut off there is still glue, and a
      call that wrote nothing is left out, so the units of a prefix are those of the whole, cut;
    - a closer that a decoder forced is not told from a generated one: where that matters (no loss on it),
      use the units of the rollout.

    Args:
        token_ids: Prompt and response, joined. Shape (L,).
        tag_ids: How the tokenizer writes tags and glue.
        prompt_length: Tokens of the prompt, at the head of `token_ids`.
        nested: Whether a thread may fork (False: the paper's flat format).
    Returns:
        Units in call order. Contexts and completions share memory.
    Raises:
        TrieError: `prompt_length` is outside 0..L, or an id is negative or no integer.
        GrammarError: The ids fork and `tag_ids` lacks the newline or the colon.
    Source:
        arXiv:2512.07843, section 3 (inference), as fixed by SPEC sections 2 and 4.
    """
    ids = as_ids(token_ids, "token_ids")
    if not 0 <= prompt_length <= len(ids):
        raise TrieError(f"prompt_length must be within 0..{len(ids)} (the length of token_ids), got {prompt_length}")
    replay = _Replay(ids, tag_ids, list(id_tags(ids, tag_ids, prompt_length)), nested)
    root = replay.run(prompt_length)
    return _emit(ids, tag_ids, root)


def fork_numbers(token_ids: Any, tag_ids: TagIds, start: int = 0) -> tuple[str, ...]:
    """The numbers that an engine call which just ended forks on; empty if it does not fork.

    This is the rule `extract_units` replays: the ids end in a </Outlines> that closes the last <Outlines>
    since `start`, and hold the numbers of the closed outlines between the two, each once, in order.

    Args:
        token_ids: Shape (L,); what was generated so far.
        tag_ids: Tags, colon and digits.
        start: First row that can be structure: the length of the prompt, or the end of the last fork.
    Raises:
        TrieError: Ids that are negative or no integers.
        GrammarError: There are outlines and `tag_ids` lacks colon or digits.
    """
    ids = as_ids(token_ids, "token_ids")
    tags = list(id_tags(ids, tag_ids, start))
    if not tags or tags[-1] != (OUTLINES + 1, len(ids) - 1, len(ids)):
        return ()
    borders = [place for place, tag in enumerate(tags[:-1]) if tag[0] in (OUTLINES, OUTLINES + 1)]
    if not borders or tags[borders[-1]][0] != OUTLINES:
        return ()
    numbers = [tag_ids.read_number(head) for head in _outline_heads(ids, tags[borders[-1] : -1])]
    return tuple(dict.fromkeys(number for number in numbers if number is not None))


def _outline_heads(ids: Int64[np.ndarray, " L"], tags: Sequence[Tag]) -> Iterator[list[int]]:
    """The first ids of every closed outline among the tags."""
    for opener, closer in pairwise(tags):
        if opener[0] == OUTLINE and closer[0] == OUTLINE + 1:
            yield ids[opener[2] : min(closer[1], opener[2] + LABEL_IDS)].tolist()


@dataclass(slots=True, eq=False)
class _Stream:
    """What one chain of calls wrote: the response, or one thread. Offsets in the joined ids."""

    opening: int  # the <Thread> tag; unused at the top
    start: int  # first generated id
    end: int = -1
    forks: list["_Fork"] = field(default_factory=list)
    fresh: int | None = None  # place among the tags of the last <Outlines> not yet closed


@dataclass(slots=True, eq=False)
class _Fork:
    """One fork: where the outlines end, the threads, and where the next sequential call begins."""

    at: int
    labels: list[Ids]
    threads: list[_Stream] = field(default_factory=list)
    join: int = -1


@dataclass(slots=True)
class _Replay:
    """The inference state machine over the tags of finished ids."""

    ids: Int64[np.ndarray, " L"]
    tag_ids: TagIds
    tags: list[Tag]
    nested: bool

    def run(self, start: int) -> _Stream:
        stack = [root := _Stream(start, start)]
        skip_to = start  # tags before it belong to an injected header
        for place, (kind, at, after) in enumerate(self.tags):
            if at < skip_to:
                continue
            stream = stack[-1]
            if kind == OUTLINES:
                stream.fresh = place
            elif kind == OUTLINES + 1 and stream.fresh is not None:
                heads = _outline_heads(self.ids, self.tags[stream.fresh : place])
                labels = [label for head in heads if (label := self.tag_ids.read_label(head))]
                labels, stream.fresh = list(dict.fromkeys(labels)), None
                if labels and (self.nested or stream is root) and self._starts(after, labels[0], True):
                    stream.forks.append(_Fork(after, labels))
                    skip_to = self._open(stack, after + len(self.tag_ids.join_newline))
            elif kind == THREAD + 1 and stream is not root:
                stream.end = after
                stack.pop()
                fork = stack[-1].forks[-1]
                if len(fork.threads) < len(fork.labels) and self._starts(after, fork.labels[len(fork.threads)], False):
                    skip_to = self._open(stack, after)
                else:
                    fork.join = after + self._held(after, self.tag_ids.join_newline)
        for stream in stack:
            stream.end = len(self.ids)
        for stream in stack[:-1]:
            stream.forks[-1].join = len(self.ids)
        return root

    def _open(self, stack: list[_Stream], at: int) -> int:
        """Opens the next thread, whose <Thread> is at `at`; returns the end of its header."""
        fork = stack[-1].forks[-1]
        start = min(at + 1 + len(fork.labels[len(fork.threads)]), len(self.ids))
        fork.threads.append(thread := _Stream(at, start))
        stack.append(thread)
        return start

    def _starts(self, at: int, label: Ids, first: bool) -> bool:
        """Whether the injected header with this label stands at `at`."""
        newline = self.tag_ids.join_newline if first else ()
        return self._held(at, (*newline, self.tag_ids.thread_open, *label)) > 0

    def _held(self, at: int, piece: Ids) -> int:
        """How many ids of a piece of glue stand at `at`: all, fewer only where the ids end, else 0."""
        here = tuple(self.ids[at : at + len(piece)].tolist())
        return len(here) if here == piece or (at + len(here) == len(self.ids) and here == piece[: len(here)]) else 0


def _emit(ids: Int64[np.ndarray, " L"], tag_ids: TagIds, root: _Stream) -> list[Unit]:
    """The units of a replayed trajectory. A task is the ids a chain of calls saw, their shift, the chain."""
    units: list[Unit] = []
    # World: the ids as this chain saw them; joined offset g stands at world[g + shift]. The first thread of
    # a fork sees the joined ids themselves, a later one its own copy.
    tasks: list[tuple[Int64[np.ndarray, " W"], int, _Stream, int, int]] = [(ids, 0, root, root.start, 0)]
    while tasks:
        world, shift, stream, start, place = tasks.pop()
        fork = stream.forks[place] if place < len(stream.forks) else None
        stop = fork.at if fork else stream.end
        if start < stop:
            units.append(Unit(world[: start + shift], world[start + shift : stop + shift]))
        if fork is None:
            continue
        tasks.append((world, shift, stream, fork.join, place + 1))
        first, *later = fork.threads
        before = world[: fork.at + shift]
        newline = np.asarray(tag_ids.join_newline, dtype=np.int64)
        for thread in reversed(later):
            seen = np.concatenate([before, newline, ids[thread.opening : thread.end]])
            tasks.append((seen, len(before) + len(newline) - thread.opening, thread, thread.start, 0))
        tasks.append((world, shift, first, first.start, 0))
    return units
