"""Engines that complete many calls at once and none in between: calls that wait form a wave.

    calls that wait ──► `_complete(requests)` of one sampling, at most `max_batch` ──► a completion or an error each

Everything happens in the event loop, without a thread or a clock: the same calls form the same waves.

Tests: tests/recipes/decoding/test_waves.py, test_lockstep_engine.py, tests/recipes/grpo/test_pgrpo_vllm.py.
"""

import asyncio

from tw_recipes.decoding.engine import Completion, EngineError, Request


class WaveEngine:
    """The part of an engine that gathers calls; a subclass implements `_complete`.

    Args:
        eos_ids: Ids that end a sequence.
        vocab_size: Ids of contexts lie below it.
        max_context: The most tokens of context and completion together, None if unbounded.
        max_batch: The most calls of one wave.

    Raises:
        ValueError: `eos_ids` is empty or `max_batch` not positive.
    """

    def __init__(
        self, eos_ids: list[int] | tuple[int, ...], vocab_size: int, max_context: int | None, max_batch: int
    ) -> None:
        if not eos_ids or max_batch < 1:
            raise ValueError(f"eos_ids must not be empty and max_batch be >= 1, got {eos_ids} and {max_batch}")
        self.eos_ids = tuple(int(token) for token in eos_ids)
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.max_batch = max_batch
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def _complete(self, requests: list[Request]) -> list[Completion]:
        """Completes a wave; what it raises becomes an EngineError of each call."""
        raise NotImplementedError

    async def generate(self, request: Request) -> Completion:
        """Completes one context in the next wave.

        Raises:
            EngineError: The context holds ids outside the vocabulary or is too long, or the wave failed.
            ValueError: A logit bias, which such engines do not know.
        """
        self._validate(request)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await future

    async def aclose(self) -> None:
        """Nothing is held between waves."""

    def _validate(self, request: Request) -> None:
        low, high = int(request.context.min()), int(request.context.max())
        if low < 0 or high >= self.vocab_size:
            raise EngineError(f"context ids must lie in 0..{self.vocab_size - 1}, got {low}..{high}")
        length = len(request.context) + request.max_tokens
        if self.max_context is not None and length > self.max_context:
            raise EngineError(
                f"context and max_tokens must fit {self.max_context} tokens, got {len(request.context)} + "
                f"{request.max_tokens}"
            )
        if request.sampling.logit_bias:
            raise ValueError(f"logit_bias is not possible with {type(self).__name__}; use OpenAIEngine with a server")

    async def _work(self) -> None:
        """Waves until nobody waits."""
        while self._waiting:
            seen = 0
            while len(self._waiting) != seen:  # let every task that can run make its call
                seen = len(self._waiting)
                for _ in range(8):
                    await asyncio.sleep(0)
            # Long calls first, so that a batch holds calls of one kind.
            self._waiting.sort(key=lambda entry: -len(entry[0].context))
            sampling = self._waiting[0][0].sampling
            wave = [entry for entry in self._waiting if entry[0].sampling == sampling][: self.max_batch]
            taken = {id(future) for _, future in wave}
            self._waiting = [entry for entry in self._waiting if id(entry[1]) not in taken]
            wave = [entry for entry in wave if not entry[1].done()]  # cancelled while waiting
            if wave:
                await self._run(wave)

    async def _run(self, wave: list[tuple[Request, asyncio.Future[Completion]]]) -> None:
        try:
            found = await self._complete([request for request, _ in wave])
        except Exception as error:
            reason = f"generation failed: {type(error).__name__}: {error}"
            for _, future in wave:
                if not future.done():
                    future.set_exception(EngineError(reason))
            return
        for (request, future), completion in zip(wave, found, strict=True):
            try:
                if request.on_tokens is not None and not future.done():
                    request.on_tokens(completion.ids.tolist())
            except Exception as problem:  # the caller's: it ends this call, and the others of the wave go on
                if not future.done():
                    future.set_exception(problem)
            if not future.done():  # `on_tokens` may have cancelled it
                future.set_result(completion)
