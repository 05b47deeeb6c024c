"""Fork/join decoding on any engine: the inference state machine of SPEC section 4.

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
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tw_core import TagIds, fork_numbers
from tw_core._ids import as_ids
from tw_core.scanner import id_tags, scan
from tw_core.tags import PARALLEL, THREAD
from tw_recipes.decoding.engine import Completion, Engine, EngineError, Request, Sampling, check_completion, stable_seed
from tw_recipes.decoding.limits import Limits
from tw_recipes.decoding.rollout import Call, Event, Kind, Path, Rollout, Status

_EMPTY = np.empty(0, dtype=np.int64)


class ForkJoinDecoder:
    """Decodes prompts on an engine, forking where the model asks for it.

    One decoder serves any number of trajectories at once, all in one event loop at a time.

    Args:
        engine: Anything with the `Engine` protocol.
        tag_ids: Tags and glue of the tokenizer, `TagIds.from_tokenizer(tokenizer)`.
        limits: Budgets of each trajectory.
        sampling: How tokens are drawn.
        eos_ids: Ids that end a response. Defaults to the engine's.
        max_calls: Back-pressure: the most engine calls in flight; further ones wait in order.
        warm_prefix: At a fork, first send the shared prefix alone for one token, which is thrown away, and the
            threads when it is back. For engines that cache a prefix only after a call that held it has ended.
    Raises:
        ValueError: The engine knows no end-of-sequence id and none is given.
    """

    def __init__(
        self,
        engine: Engine,
        tag_ids: TagIds,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        *,
        eos_ids: Sequence[int] | None = None,
        max_calls: int = 1024,
        warm_prefix: bool = False,
    ) -> None:
        self.engine = engine
        self.tag_ids = tag_ids
        self.limits = limits or Limits()
        self.sampling = sampling or Sampling()
        self.eos_ids = tuple(engine.eos_ids if eos_ids is None else eos_ids)
        self.max_calls = max_calls
        self.warm_prefix = warm_prefix
        if not self.eos_ids:
            raise ValueError("eos_ids must hold at least one id, got none from the engine; pass eos_ids=[...]")
        if max_calls < 1:
            raise ValueError(f"max_calls must be >= 1, got {max_calls}")
        tag_ids.forced_block_close, tag_ids.label("1")
        structure = set(tag_ids.ids) & set(self.eos_ids)
        if structure:
            raise ValueError(f"eos_ids must not be tags, got {sorted(structure)}; pass the model's end-of-sequence ids")
        self._running: dict[str, _Trajectory] = {}
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def decode(
        self, prompt_ids: Any, key: str | None = None, *, on_event: Callable[[Event], None] | None = None
    ) -> Rollout:
        """Decodes one prompt.

        Args:
            prompt_ids: Shape (P,), P >= 1.
            key: Names the trajectory: affinity key of its calls, part of their seeds. Defaults to a digest of the
                prompt.
            on_event: Called at every step, in the event loop; it must not block.
        Returns:
            The rollout; an engine's failure is its status, not an exception.
        Raises:
            TrieError: `prompt_ids` are no token ids.
            ValueError: The prompt is empty, or a trajectory with this key is in flight.
        """
        prompt = as_ids(prompt_ids, "prompt_ids")
        if not len(prompt):
            raise ValueError("prompt_ids must hold at least one id, got none; encode the prompt with its chat template")
        key = f"prompt-{stable_seed(prompt.tobytes()):08x}-{len(self._running)}" if key is None else key
        if key in self._running:
            raise ValueError(f"key {key!r} is already in flight; give every trajectory its own key")
        trajectory = _Trajectory(self, prompt, key, on_event)
        self._running[key] = trajectory
        timer = None
        if self.limits.max_seconds is not None:
            timer = asyncio.get_running_loop().call_later(self.limits.max_seconds, trajectory.cancel, "max_seconds")
        try:
            return await trajectory.run()
        finally:
            del self._running[key]
            if timer is not None:
                timer.cancel()

    def cancel(self, key: str) -> bool:
        """Stops a trajectory in flight (call it in the event loop); its `decode` returns with status "cancelled".

        Returns:
            Whether there was one. (Cancelling the task of `decode` instead ends it without a result.)
        """
        if (trajectory := self._running.get(key)) is None:
            return False
        trajectory.cancel("cancelled by the caller")
        return True

    async def stream(
        self, prompts: Iterable[Any], keys: Iterable[str] | None = None, *, max_trajectories: int = 4096
    ) -> AsyncIterator[tuple[int, Rollout]]:
        """Decodes prompts as they come from an iterable; yields (place, rollout) as they finish.

        Holds at most `max_trajectories` prompts and results at a time.
        """
        names = iter(keys) if keys is not None else None
        waiting: set[asyncio.Task[tuple[int, Rollout]]] = set()
        source = enumerate(prompts)
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < max_trajectories:
                    if (entry := next(source, None)) is None:
                        more = False
                        break
                    key = str(entry[0]) if names is None else next(names)
                    waiting.add(asyncio.create_task(self._numbered(entry[0], entry[1], key)))
                if waiting:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _numbered(self, place: int, prompt: Any, key: str) -> tuple[int, Rollout]:
        return place, await self.decode(prompt, key)

    def decode_all(self, prompts: Iterable[Any], keys: Iterable[str] | None = None) -> list[Rollout]:
        """Decodes all prompts and returns their rollouts in order; for callers that are not async.

        Works inside a running event loop too (a notebook): then a thread of its own runs the decoding. The engine
        is closed at the end, so that a model shared with training is as it was; the next call starts it again.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._all(prompts, keys))
        with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
            return pool.submit(asyncio.run, self._all(prompts, keys)).result()

    async def _all(self, prompts: Iterable[Any], keys: Iterable[str] | None) -> list[Rollout]:
        try:
            found = [entry async for entry in self.stream(prompts, keys)]
        finally:
            await self.engine.aclose()
        return [rollout for _, rollout in sorted(found, key=lambda entry: entry[0])]

    def _semaphore(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = (loop, asyncio.Semaphore(self.max_calls))
        return self._gate[1]


@dataclass(slots=True, eq=False)
class _Ended:
    """A stream at its end: everything it saw (its base included), why it ended, and its calls in order."""

    ids: np.ndarray
    why: str  # "eos", "closed", "length", "error", "cancelled"
    reason: str
    calls: list[Call] = field(default_factory=list)


class _Trajectory:
    """One trajectory in flight."""

    def __init__(
        self, decoder: ForkJoinDecoder, prompt: np.ndarray, key: str, on_event: Callable[[Event], None] | None
    ) -> None:
        self.decoder, self.prompt, self.key, self.on_event = decoder, prompt, key, on_event
        self.engine, self.tags, self.limits = decoder.engine, decoder.tag_ids, decoder.limits
        self.gate = decoder._semaphore()
        self.hit: Counter[str] = Counter()
        self.forced = 0
        self.cancelled = ""
        self.in_flight: set[asyncio.Task[Any]] = set()
        self.began = time.perf_counter()

    def cancel(self, reason: str) -> None:
        self.cancelled = self.cancelled or reason
        for task in self.in_flight:
            task.cancel()

    async def run(self) -> Rollout:
        room, bound = self.limits.max_total_tokens, self.engine.max_context
        if bound is not None:
            room = min(room, bound - len(self.prompt))
        if room < 1:
            reason = (
                f"the prompt has {len(self.prompt)} tokens and the engine's context {bound}: nothing can be written"
            )
            ended = _Ended(self.prompt, "error", reason)
        else:
            ended = await self._stream(self.prompt, room, ())
        ids = self._close(ended, len(self.prompt), ())
        status: Status = {"eos": "done", "length": "length", "cancelled": "cancelled"}.get(ended.why, "error")  # type: ignore[assignment]
        if status == "cancelled" and self.cancelled == "max_seconds":
            self.hit["max_seconds"] += 1
        self._tell("end", ())
        seconds = time.perf_counter() - self.began
        return Rollout(
            key=self.key,
            ids=ids,
            prompt_length=len(self.prompt),
            calls=tuple(ended.calls),
            status=status,
            reason=ended.reason,
            tag_ids=self.tags,
            limits_hit=dict(self.hit),
            forced=self.forced,
            seconds=seconds,
        )

    async def _stream(self, base: np.ndarray, room: int, path: Path) -> _Ended:
        """Runs one stream from `base` on; it writes at most `room` tokens, glue and nested threads included."""
        limits, tags, eos = self.limits, self.tags, self.decoder.eos_ids
        own_stops = (tags.thread_close, *eos) if path else eos
        ids, fresh, blocks = base, len(base), 0
        calls: list[Call] = []
        while True:
            left = room - (len(ids) - len(base))
            if left < 1:
                return self._out_of_tokens(ids, calls, path)
            may_fork = len(path) < limits.max_depth and blocks < limits.max_blocks
            call = await self._call(ids, (tags.outlines_close, *own_stops) if may_fork else own_stops, left, path)
            calls.append(call)
            if call.error:
                return _Ended(ids, call.finish, call.error, calls)
            if not len(call.completion):
                return _Ended(ids, "length", "the engine wrote nothing", calls)
            ids = np.concatenate([ids, call.completion])
            last = int(call.completion[-1])
            if last in eos:
                return _Ended(ids, "eos", "end of sequence", calls)
            if last == tags.thread_close and path and call.finish == "stop":
                return _Ended(ids, "closed", "the thread closed itself", calls)
            if last != tags.outlines_close or not may_fork:
                if len(call.completion) < left:
                    return _Ended(ids, "length", f"the engine stopped after {len(call.completion)} tokens", calls)
                return self._out_of_tokens(ids, calls, path)
            numbers = fork_numbers(ids[fresh:], tags)
            if not numbers:
                continue
            blocks += 1
            if blocks == limits.max_blocks:
                self.hit["max_blocks"] += 1
            if len(numbers) > limits.max_threads:
                self.hit["max_threads"] += 1
                numbers = numbers[: limits.max_threads]
            forked = await self._fork(ids, numbers, room - (len(ids) - len(base)), blocks - 1, path, calls)
            if forked is None:
                return self._out_of_tokens(ids, calls, path)
            ids, fresh = forked.ids, len(forked.ids)
            if forked.why != "joined":
                return _Ended(ids, forked.why, forked.reason, calls)

    def _out_of_tokens(self, ids: np.ndarray, calls: list[Call], path: Path) -> _Ended:
        name = "max_thread_tokens" if path else "max_total_tokens"
        self.hit[name] += 1
        return _Ended(ids, "length", f"{name} is used up", calls)

    async def _fork(
        self, ids: np.ndarray, numbers: tuple[str, ...], left: int, block: int, path: Path, calls: list[Call]
    ) -> _Ended | None:
        """Runs the threads of one block and joins them; None if there is no room for them."""
        tags = self.tags
        first = [np.array(tags.thread_header(number, first=True), dtype=np.int64) for number in numbers]
        # The header in the joined ids: the newline stands before the first thread only.
        lead = len(tags.join_newline)
        joined_headers = [first[0], *(header[lead:] for header in first[1:])]
        glue = sum(map(len, joined_headers)) + lead + len(numbers) * len(tags.forced_thread_close)
        room = min((left - glue) // len(numbers), self.limits.max_thread_tokens)
        if room < 1:
            return None
        self._tell("fork", path, numbers=numbers)
        if self.decoder.warm_prefix:
            calls.append(await self._call(ids, self.decoder.eos_ids, 1, path, "warm"))
        bases = [np.concatenate([ids, header]) for header in first]
        ends: list[_Ended]
        if len(numbers) == 1:
            ends = [await self._stream(bases[0], room, (*path, (block, numbers[0])))]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._stream(base, room, (*path, (block, number))))
                    for base, number in zip(bases, numbers, strict=True)
                ]
            ends = [task.result() for task in tasks]
        pieces = [ids]
        for base, header, end, number in zip(bases, joined_headers, ends, numbers, strict=True):
            calls += end.calls
            pieces += [header, self._close(end, len(base), (*path, (block, number)))[len(base) :]]
        joined = np.concatenate([*pieces, np.array(tags.join_newline, dtype=np.int64)])
        if self.on_event is not None:
            self._tell("join", path, joined[len(ids) :])
        failed = next((end for why in ("cancelled", "error") for end in ends if end.why == why), None)
        if failed is not None:
            return _Ended(joined, failed.why, failed.reason)
        return _Ended(joined, "joined", "")

    def _close(self, end: _Ended, start: int, path: Path) -> np.ndarray:
        """The ids of a stream that ended, with every element closed that is open since `start`.

        Elements the model opened and left open are closed innermost first; then the thread itself. An
        end-of-sequence id that would stand before a closer is dropped from the joined ids (its unit keeps it).
        """
        ids, tags = end.ids, self.tags
        if end.why == "closed":
            return ids
        body = ids[:-1] if end.why == "eos" else ids
        closers: list[int] = []
        # The last span of each level is the only one that can be open.
        span = scan(id_tags(body, tags, start), start, len(body))
        while span.children and not span.children[-1].closed and span.children[-1].end == len(body):
            span = span.children[-1]
            if span.kind in (PARALLEL, THREAD):
                closers[:0] = tags.forced_block_close if span.kind == PARALLEL else tags.forced_thread_close
                self.forced += 1
        if path:
            closers += tags.forced_thread_close
            self.forced += 1
        if not closers:
            return ids
        self._tell("closed", path, closers)
        return np.concatenate([body, np.array(closers, dtype=np.int64)])

    async def _call(
        self, context: np.ndarray, stops: tuple[int, ...], room: int, path: Path, kind: Kind | None = None
    ) -> Call:
        """One engine call; a failure or a cancellation is in the result, never raised."""
        kind = kind or ("thread" if path else "sequential")
        sampling = self.decoder.sampling
        seed = None if sampling.seed is None else stable_seed(sampling.seed, self.key, path, len(context))
        on_tokens = None
        if self.on_event is not None and kind != "warm":
            on_tokens = lambda ids: self._tell("tokens", path, ids)  # noqa: E731
        request = Request(context, stops, room, sampling, self.key, seed, on_tokens)
        queued = started = time.perf_counter() - self.began
        task = asyncio.current_task()
        assert task is not None
        answer, finish, error = Completion(_EMPTY), "error", ""
        self.in_flight.add(task)
        try:
            if self.cancelled:
                raise asyncio.CancelledError
            async with self.gate:
                started = time.perf_counter() - self.began
                answer = check_completion(request, await self.engine.generate(request))
            finish = answer.finish
        except EngineError as problem:
            error = str(problem) or type(problem).__name__
        except asyncio.CancelledError:
            if not self.cancelled:
                raise
            with suppress(AttributeError):
                task.uncancel()
            finish, error = "cancelled", self.cancelled
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
        if self.on_event is not None:
            self.on_event(Event(kind, path, tuple(int(token) for token in ids), numbers))
