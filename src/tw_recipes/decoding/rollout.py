"""Results of decoding: calls, the rollout made of them, and events for live display.

    Call*  ──►  Rollout: ids (joined), units (what is trained), log-probs, stats, status and reason

Units hold what the engine saw and wrote, including an end-of-sequence id that ended a thread; the joined ids
hold what the next call saw: such an id replaced by the forced closer. So the units of a rollout are the truth
for training and `extract_units(rollout.ids)` equals them whenever nothing was forced or refused (two calls around a
</Outlines> that did not fork are one unit there: the same targets).

Tests: tests/recipes/decoding/test_decoder.py, test_decoder_properties.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tw_core import ParallelStats, TagIds, Unit, parallel_stats

Status = Literal["done", "length", "error", "cancelled"]
LOST: tuple[Status, ...] = ("error", "cancelled")
"""Of trajectories that are no samples of the model: an engine call failed, or the run was stopped."""
"""done: an end-of-sequence id; length: a budget is gone; error: an engine call was lost; cancelled: it was stopped."""

Kind = Literal["sequential", "thread", "warm"]

Path = tuple[tuple[int, str], ...]
"""Where in the tree: (block of the stream, number of the thread) from the outside in; () is the top level."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One engine call and what became of it.

    Attributes:
        kind: "sequential" at the top level, "thread" inside a thread (also after a nested join), "warm" for a call
            whose one token is thrown away.
        path: The thread it belongs to.
        context: Shape (C,), int64.
        completion: Shape (G,), int64; empty if the call was lost.
        logprobs: Shape (G,), float64, or None.
        finish: "stop", "length", "error" or "cancelled".
        cached_tokens: Context tokens served from the engine's cache, None if unknown.
        queued: Seconds from the start of the trajectory until the call was wanted.
        started: Until it was sent (later than `queued` under back-pressure).
        ended: Until it came back.
        replica: Who answered.
        attempts: Tries it took.
        error: Why it was lost, "" if it was not.
    """

    kind: Kind
    path: Path
    context: np.ndarray
    completion: np.ndarray
    logprobs: np.ndarray | None
    finish: str
    cached_tokens: int | None
    queued: float
    started: float
    ended: float
    replica: str = ""
    attempts: int = 1
    error: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for live display.

    Attributes:
        kind: "tokens" (as they come, engines that stream), "call" (a call came back: all its ids), "fork" (`numbers`
            says of what), "join", "closed" (a closer was forced) or "end".
        path: The thread it happened in.
        ids: The new ids, for "tokens", "call", "join" and "closed".
        numbers: The threads, for "fork".
    """

    kind: str
    path: Path
    ids: tuple[int, ...] = ()
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Rollout:
    """One decoded trajectory. Always there, always closed, whatever happened.

    Attributes:
        key: As given to `decode`.
        ids: Prompt and response, joined. Shape (L,), int64. No element that the decoder opened is left open.
        prompt_length: Tokens of the prompt at the head of `ids`.
        calls: Every call, in call order (a thread's before the next thread's, threads before the join).
        status: "done", "length", "error" or "cancelled".
        reason: One line; what ended it.
        limits_hit: How often each limit bit, by its name in `Limits`.
        forced: Closers that the decoder appended because the model did not write them. 0 in a clean result.
        seconds: Wall-clock time.
    """

    key: str
    ids: np.ndarray
    prompt_length: int
    calls: tuple[Call, ...]
    status: Status
    reason: str
    tag_ids: TagIds
    limits_hit: Mapping[str, int] = field(default_factory=dict)
    forced: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        """One line: asyncio writes a task's result into messages, and arrays of ids are long."""
        return (
            f"Rollout(key={self.key!r}, status={self.status!r}, reason={self.reason!r}, "
            f"response_tokens={len(self.ids) - self.prompt_length}, calls={len(self.calls)}, forced={self.forced})"
        )

    @property
    def ok(self) -> bool:
        """Whether the model ended it by itself."""
        return self.status == "done"

    @property
    def complete(self) -> bool:
        """Whether the model wrote every closer and the end: fit to be learned from."""
        return self.ok and not self.forced

    @property
    def response_ids(self) -> np.ndarray:
        """The joined ids without the prompt."""
        return self.ids[self.prompt_length :]

    @cached_property
    def written(self) -> tuple[Call, ...]:
        """The calls that are units: those that wrote something that counts."""
        return tuple(call for call in self.calls if call.kind != "warm" and len(call.completion))

    @cached_property
    def units(self) -> list[Unit]:
        """Training units in call order; loss falls on their completions, which hold generated tokens only."""
        return [Unit(call.context, call.completion) for call in self.written]

    @property
    def kinds(self) -> list[str]:
        """Kind of each unit."""
        return [call.kind for call in self.written]

    @property
    def logprobs(self) -> list[np.ndarray] | None:
        """Log-probs of each unit's completion, None if the engine gave none for some unit."""
        found = [call.logprobs for call in self.written if call.logprobs is not None]
        return found if len(found) == len(self.written) else None

    @cached_property
    def stats(self) -> ParallelStats:
        """Measures of the response."""
        return parallel_stats(self.ids, self.tag_ids, prompt_length=self.prompt_length)

    @property
    def generated_tokens(self) -> int:
        """Tokens that the engine wrote."""
        return sum(len(call.completion) for call in self.written)

    @property
    def cached_share(self) -> float | None:
        """Share of all context tokens that came from the engine's prefix cache, None if it does not say."""
        known = [call for call in self.calls if call.cached_tokens is not None]
        total = sum(len(call.context) for call in known)
        return sum(call.cached_tokens or 0 for call in known) / total if total else None

    def text(self, tokenizer: Any) -> str:
        """The response as text, special tokens kept."""
        return tokenizer.decode(self.response_ids.tolist(), skip_special_tokens=False)
