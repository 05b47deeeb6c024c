"""One trajectory in flight: the inference state machine of SPEC section 4.

    stream ── call ──► ends in eos, its closer, or a budget                              ─► close what is open
       ▲        └────► ends in </Outlines> of fresh numbered outlines ─► fork: a stream per outline, all at once
       └── joined ids: headers, bodies, newline ◄────────────────────────┘

A stream is the response or one thread; threads are streams again, so nesting is recursion. Ids in, ids out: a
context is a concatenation of the engine's ids and separately encoded glue, nothing is decoded and encoded again.
Which ids fork is `tw_core.fork_numbers`, the rule that `extract_units` replays.

Tests: tests/recipes/decoding. Source: arXiv:2512.07843, section 3, with the deviations that SPEC names.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from tw_core import TagIds, fork_numbers
from tw_core.scanner import Span, id_tags, scan
from tw_core.tags import PARALLEL, THREAD
from tw_recipes.decoding.engine import Completion, Engine, EngineError, Request, Sampling, check_completion, stable_seed
from tw_recipes.decoding.limits import Limits
from tw_recipes.decoding.rollout import Call, Event, Kind, Path, Rollout, Status

_EMPTY = np.empty(0, dtype=np.int64)
_STATUS: dict[str, Status] = {"eos": "done", "length": "length", "error": "error", "cancelled": "cancelled"}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Setup:
    """What all trajectories of a decoder share; the fields are arguments of `ForkJoinDecoder`."""

    engine: Engine
    tag_ids: TagIds
    limits: Limits
    sampling: Sampling
    eos_ids: tuple[int, ...]
    warm_prefix: bool


@dataclass(slots=True, eq=False)
class _Ended:
    """A stream at its end: everything it saw (its base included), why it ended, and its calls in order."""

    ids: np.ndarray
    why: str  # "eos", "closed", "length", "error", "cancelled"; of a block: "joined" or one of the last two
    reason: str
    calls: list[Call] = field(default_factory=list)


class Trajectory:
    """One trajectory; `run` once.

    Args:
        setup: What it shares with others.
        prompt: Shape (P,), int64.
        key: Its name.
        gate: Held during every engine call.
        on_event: Called at every step, in the event loop.
    """

    def __init__(
        self,
        setup: Setup,
        prompt: np.ndarray,
        key: str,
        gate: asyncio.Semaphore,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.setup, self.prompt, self.key, self.gate, self.on_event = setup, prompt, key, gate, on_event
        self.tags, self.limits = setup.tag_ids, setup.limits
        self.hit: Counter[str] = Counter()
        self.forced = 0
        self.cancelled = ""
        self.raised: Exception | None = None
        self.in_flight: set[asyncio.Task[Any]] = set()
        self.began = time.perf_counter()

    def cancel(self, reason: str) -> None:
        """Ends the calls in flight and lets no further one start."""
        self.cancelled = self.cancelled or reason
        for task in self.in_flight:
            task.cancel()

    async def run(self) -> Rollout:
        """Decodes to the end, whatever happens to the calls."""
        room, limit, bound = self.limits.max_total_tokens, "max_total_tokens", self.setup.engine.max_context
        if bound is not None and bound - len(self.prompt) < room:
            room, limit = bound - len(self.prompt), "max_context"
        if room < 1:
            reason = (
                f"the prompt has {len(self.prompt)} tokens and the engine's context {bound}: nothing can be written"
            )
            self.hit[limit] += 1
            ended = _Ended(self.prompt, "error", reason)
        else:
            ended = await self._stream(self.prompt, room, limit, ())
        ids = self._close(ended, len(self.prompt), ())
        if ended.why == "cancelled" and self.cancelled == "max_seconds":
            self.hit["max_seconds"] += 1
        self._tell("end", ())
        return Rollout(
            key=self.key,
            ids=ids,
            prompt_length=len(self.prompt),
            calls=tuple(ended.calls),
            status=_STATUS[ended.why],
            reason=ended.reason,
            tag_ids=self.tags,
            limits_hit=dict(self.hit),
            forced=self.forced,
            seconds=time.perf_counter() - self.began,
        )

    async def _stream(self, base: np.ndarray, room: int, limit: str, path: Path) -> _Ended:
        """Runs one stream from `base` on.

        Args:
            base: What its first call sees.
            room: Tokens it may write, glue and nested threads included.
            limit: The limit that set `room`.
            path: Its place in the tree.
        """
        limits, tags, eos = self.limits, self.tags, self.setup.eos_ids
        own_stops = (tags.thread_close, *eos) if path else eos
        ids, fresh, blocks = base, len(base), 0
        calls: list[Call] = []
        while True:
            left = room - (len(ids) - len(base))
            if left < 1:
                return self._out_of_tokens(ids, limit, calls)
            may_fork = len(path) < limits.max_depth and blocks < limits.max_blocks
            call = await self._call(ids, (tags.outlines_close, *own_stops) if may_fork else own_stops, left, path)
            calls.append(call)
            if call.error:
                return _Ended(ids, call.finish, call.error, calls)
            if not len(call.completion):
                return _Ended(ids, "length", "the engine wrote nothing", calls)
            ids = np.concatenate([ids, call.completion])
            last = int(call.completion[-1])
            if not may_fork:
                refused = "max_depth" if len(path) >= limits.max_depth else "max_blocks"
                self._count_refused_forks(ids, fresh, len(call.context), refused)
            if last in eos:
                return _Ended(ids, "eos", "end of sequence", calls)
            if last == tags.thread_close and path:
                return _Ended(ids, "closed", "the thread closed itself", calls)
            if last != tags.outlines_close or not may_fork:
                if len(call.completion) < left:
                    return _Ended(ids, "length", f"the engine stopped after {len(call.completion)} tokens", calls)
                return self._out_of_tokens(ids, limit, calls)
            numbers = fork_numbers(ids[fresh:], tags)
            if not numbers:
                continue
            if len(numbers) > limits.max_threads:
                self.hit["max_threads"] += 1
                numbers = numbers[: limits.max_threads]
            forked = await self._fork(ids, numbers, room - (len(ids) - len(base)), limit, blocks, path, calls)
            if forked is None:
                return self._out_of_tokens(ids, limit, calls)
            ids, fresh, blocks = forked.ids, len(forked.ids), blocks + 1
            if forked.why != "joined":
                return _Ended(ids, forked.why, forked.reason, calls)

    def _out_of_tokens(self, ids: np.ndarray, limit: str, calls: list[Call]) -> _Ended:
        self.hit[limit] += 1
        return _Ended(ids, "length", f"{limit} is used up", calls)

    def _count_refused_forks(self, ids: np.ndarray, fresh: int, start: int, limit: str) -> None:
        """Counts where the ids from `start` on would have forked without the limit."""
        for end in start + 1 + np.flatnonzero(ids[start:] == self.tags.outlines_close):
            if fork_numbers(ids[fresh:end], self.tags):
                self.hit[limit] += 1
                fresh = int(end)

    async def _fork(
        self,
        ids: np.ndarray,
        numbers: tuple[str, ...],
        left: int,
        limit: str,
        block: int,
        path: Path,
        calls: list[Call],
    ) -> _Ended | None:
        """Runs the threads of one block and joins them; None if there is no room for them."""
        tags = self.tags
        first = [np.array(tags.thread_header(number, first=True), dtype=np.int64) for number in numbers]
        # The header in the joined ids: the newline stands before the first thread only.
        lead = len(tags.join_newline)
        joined_headers = [first[0], *(header[lead:] for header in first[1:])]
        glue = sum(map(len, joined_headers)) + lead + len(numbers) * len(tags.forced_thread_close)
        room = (left - glue) // len(numbers)
        if room >= self.limits.max_thread_tokens:
            room, limit = self.limits.max_thread_tokens, "max_thread_tokens"
        if room < 1:
            return None
        self._tell("fork", path, numbers=numbers)
        if self.setup.warm_prefix:
            calls.append(await self._call(ids, self.setup.eos_ids, 1, path, "warm"))
        bases = [np.concatenate([ids, header]) for header in first]
        paths = [(*path, (block, number)) for number in numbers]
        streams = [self._stream(base, room, limit, own) for base, own in zip(bases, paths, strict=True)]
        ends = [await streams[0]] if len(streams) == 1 else await _at_once(streams)
        pieces = [ids]
        for base, header, end, own in zip(bases, joined_headers, ends, paths, strict=True):
            calls += end.calls
            pieces += [header, self._close(end, len(base), own)[len(base) :]]
        joined = np.concatenate([*pieces, np.array(tags.join_newline, dtype=np.int64)])
        if self.on_event is not None:
            self._tell("join", path, joined[len(ids) :])
        failed = next((end for why in ("cancelled", "error") for end in ends if end.why == why), None)
        if failed is not None:
            return _Ended(joined, failed.why, failed.reason)
        return _Ended(joined, "joined", "")

    def _close(self, end: _Ended, start: int, path: Path) -> np.ndarray:
        """The ids of a stream that ended, with every block and thread closed that is open since `start`.

        What the model opened and left open is closed innermost first, then the thread itself: also where its
        </Thread> closed a thread that the model had written inside, without a fork. An end-of-sequence id that
        would stand before a closer is dropped from the joined ids (its unit keeps it).
        """
        ids, tags = end.ids, self.tags
        body = ids[:-1] if end.why == "eos" else ids
        # A thread's ids are read as what they are: the inside of a thread in a block.
        around = ((PARALLEL, start, start), (THREAD, start, start)) if path else ()
        span = scan(chain(around, id_tags(body, tags, start)), start, len(body))
        opened: list[Span] = []
        while span.children and not span.children[-1].closed and span.children[-1].end == len(body):
            opened.append(span := span.children[-1])
        closers: list[int] = []
        for span in reversed(opened[1:] if path else opened):
            if span.kind == THREAD:
                closers += tags.forced_thread_close
            elif span.kind == PARALLEL:
                # After a join the newline before the closer is there.
                joined = not closers and self._ends_in_a_join(span, body)
                closers += tags.forced_block_close[len(tags.join_newline) if joined else 0 :]
            else:
                continue  # outlines and conclusions end with their block
            self.forced += 1
        if not closers:
            return ids
        self._tell("closed", path, closers)
        return np.concatenate([body, np.array(closers, dtype=np.int64)])

    def _ends_in_a_join(self, block: Span, body: np.ndarray) -> bool:
        last = block.children[-1] if block.children else None
        return last is not None and last.kind == THREAD and tuple(body[last.end :].tolist()) == self.tags.join_newline

    async def _call(
        self, context: np.ndarray, stops: tuple[int, ...], room: int, path: Path, kind: Kind | None = None
    ) -> Call:
        """One engine call; a failure or a cancellation is in the result. A ValueError says misuse and is raised."""
        kind = kind or ("thread" if path else "sequential")
        sampling = self.setup.sampling
        seed = None if sampling.seed is None else stable_seed(sampling.seed, self.key, path, len(context))
        on_tokens = None
        if self.on_event is not None and kind != "warm":
            on_tokens = lambda ids: self._tell("tokens", path, ids)  # noqa: E731
        request = Request(context, stops, room, sampling, self.key, seed, on_tokens)
        queued = started = time.perf_counter() - self.began
        task = asyncio.current_task()
        assert task is not None
        answer, error = Completion(_EMPTY, finish="length"), ""
        finish: str = "error"
        self.in_flight.add(task)
        try:
            if self.cancelled:
                raise asyncio.CancelledError
            async with self.gate:
                started = time.perf_counter() - self.began
                answer = check_completion(request, await self.setup.engine.generate(request))
            finish = answer.finish
        except asyncio.CancelledError:
            if not self.cancelled:
                raise
            task.uncancel()
            finish, error = "cancelled", self.cancelled
        except ValueError:
            raise
        except EngineError as problem:
            error = str(problem) or "the engine gave no reason"
        except Exception as problem:
            if problem is self.raised:
                raise
            error = f"{type(problem).__name__}: {problem}"
        finally:
            self.in_flight.discard(task)
        ended = time.perf_counter() - self.began
        if self.on_event is not None and kind != "warm" and not error:
            self._tell("call", path, answer.ids)
        return Call(
            *(kind, path, context, answer.ids, answer.logprobs, finish, answer.cached_tokens),
            *(queued, started, ended, answer.replica, answer.attempts, error),
        )

    def _tell(self, kind: str, path: Path, ids: Any = (), numbers: tuple[str, ...] = ()) -> None:
        if self.on_event is None:
            return
        try:
            self.on_event(Event(kind, path, tuple(int(token) for token in ids), numbers))
        except Exception as problem:
            self.raised = problem  # the caller's own, also where an engine passes it on
            raise


async def _at_once(streams: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Results of all; the first exception ends the others and is raised as it is (a TaskGroup would wrap it)."""
    tasks = [asyncio.create_task(stream) for stream in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        if not all(task.done() for task in tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
