"""An engine that says what it is told to: for tests, demonstrations and the cost of the decoder itself.

Tests: tests/recipes/decoding/test_decoder.py.
"""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from tw_recipes.decoding.engine import Completion, Request, is_any

Line = Sequence[int] | np.ndarray | Completion | Exception


class ScriptedEngine:
    """Answers call k with line k of a script, or with what a function of the request returns.

    A line of ids is what the engine would write if nothing stopped it; it is cut after the first stop id, or at
    `max_tokens`. A `Completion` is returned as it is, an exception is raised. Past the end of a script every call
    writes the first end-of-sequence id.

    Args:
        script: Lines in the order in which calls are made, or a function of the request.
        eos_ids: Ids that end a sequence.
        max_context: As in `Engine`.
        latency: Seconds per call and per token, both 0 by default.
        logprob: Log-prob given to every token; None gives none.
    """

    def __init__(
        self,
        script: Sequence[Line] | Callable[[Request], Line],
        eos_ids: Sequence[int],
        *,
        max_context: int | None = None,
        latency: tuple[float, float] = (0.0, 0.0),
        logprob: float | None = None,
    ) -> None:
        self.script = script
        self.eos_ids = tuple(eos_ids)
        self.max_context = max_context
        self.latency = latency
        self.logprob = logprob
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Completion:
        """Answers one call from the script."""
        place = len(self.requests)
        self.requests.append(request)
        if callable(self.script):
            line = self.script(request)
        else:
            line = self.script[place] if place < len(self.script) else self.eos_ids[:1]
        if isinstance(line, Exception):
            raise line
        if not isinstance(line, Completion):
            line = self._cut(np.asarray(line, dtype=np.int64), request)
        delay = self.latency[0] + self.latency[1] * len(line.ids)
        if delay:
            await asyncio.sleep(delay)
        if request.on_tokens is not None:
            request.on_tokens(line.ids.tolist())
        return line

    def _cut(self, ids: np.ndarray, request: Request) -> Completion:
        stops = np.flatnonzero(is_any(ids, request.stop_ids))
        end = min(int(stops[0]) + 1 if len(stops) else len(ids), request.max_tokens)
        ids = ids[:end]
        stopped = bool(len(ids)) and bool(len(stops)) and int(stops[0]) < end
        logprobs = None if self.logprob is None else np.full(len(ids), self.logprob)
        return Completion(ids, logprobs, "stop" if stopped else "length")

    async def aclose(self) -> None:
        """Nothing to give back."""
