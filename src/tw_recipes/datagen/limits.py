"""Rate limits and the budget: when the next question may be asked, and whether it may be asked at all.

Both count before a call what it will take at most or about, and put it right afterwards.
Guarded by tests/recipes/datagen/test_limits.py.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from tw_recipes.datagen.reasons import DatagenError

_INSTANT = 1e-6  # seconds; shorter waits are rounding


class BudgetExhaustedError(DatagenError):
    """The next question could exceed the budget; the run stops and can be gone on with."""


class RateLimiter:
    """Two token buckets, requests and tokens, each holding one second's worth; waiting calls go in the order they came.

    A larger call goes when its bucket is full and leaves it in debt, so that the average over minutes is kept.

    Args:
        requests_per_minute: None for no limit.
        tokens_per_minute: Prompt and reply together; None for no limit.
        clock: Seconds, for tests.
        sleep: Waits, for tests.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        for name, value in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive or None, got {value}")
        self._limits = (requests_per_minute, tokens_per_minute)
        self._most = (max((requests_per_minute or 0) / 60, 1.0), (tokens_per_minute or 0) / 60)
        self._free = list(self._most)
        self._clock, self._sleep, self._then = clock, sleep, clock()
        self._turn = asyncio.Lock()

    async def acquire(self, tokens: int) -> None:
        """Wait until one more call of about so many tokens may go out."""
        if self._limits == (None, None):
            return
        async with self._turn:
            while (wait := self._wait((1.0, float(tokens)))) > _INSTANT:
                await self._sleep(wait)
            self._free[0] -= 1
            self._free[1] -= tokens

    def settle(self, expected: int, used: int) -> None:
        """Say how many tokens the call has taken."""
        self._free[1] += expected - used

    def _wait(self, wanted: tuple[float, float]) -> float:
        now = self._clock()
        waits = [0.0]
        for i, limit in enumerate(self._limits):
            if limit is None:
                continue
            self._free[i] = min(self._most[i], self._free[i] + (now - self._then) * limit / 60)
            waits.append((min(wanted[i], self._most[i]) - self._free[i]) * 60 / limit)
        self._then = now
        return max(waits)


class Budget:
    """A limit on tokens and money that is never exceeded, for one process.

    A call reserves the most it can take; where that does not fit, it waits for calls in flight to give back what they
    did not use, and ends the run if there are none.

    Args:
        max_tokens: Prompt and reply together; None for no limit.
        max_cost: In the currency of the prices; None for no limit.
        tokens: What earlier runs of the job have used.
        cost: Likewise.
    """

    def __init__(
        self, max_tokens: int | None = None, max_cost: float | None = None, *, tokens: int = 0, cost: float = 0.0
    ) -> None:
        self.max_tokens, self.max_cost = max_tokens, max_cost
        self.tokens, self.cost = tokens, cost
        self.exhausted = False
        self._reserved = [0, 0.0]
        self._in_flight = 0
        self._changed = asyncio.Condition()

    async def reserve(self, tokens: int, cost: float) -> None:
        """Set aside what a call can take at most.

        Raises:
            BudgetExhaustedError: It does not fit, and nothing will be given back.
        """
        async with self._changed:
            while not self.exhausted and not self._fits(tokens, cost):
                if not self._in_flight:
                    self.exhausted = True
                    break
                await self._changed.wait()
            if self.exhausted:
                self._changed.notify_all()
                raise BudgetExhaustedError(
                    f"the budget is used up: {self.tokens:,} tokens (max_tokens={self.max_tokens}) and {self.cost:.2f} "
                    f"(max_cost={self.max_cost}); raise it and run the same command to go on"
                )
            self._reserved[0] += tokens
            self._reserved[1] += cost
            self._in_flight += 1

    async def settle(self, reserved: tuple[int, float], used: tuple[int, float]) -> None:
        """Give back a reservation and book what the call has taken."""
        async with self._changed:
            self._reserved[0] -= reserved[0]
            self._reserved[1] -= reserved[1]
            self._in_flight -= 1
            self.tokens += used[0]
            self.cost += used[1]
            self._changed.notify_all()

    def _fits(self, tokens: int, cost: float) -> bool:
        return (self.max_tokens is None or self.tokens + self._reserved[0] + tokens <= self.max_tokens) and (
            self.max_cost is None or self.cost + self._reserved[1] + cost <= self.max_cost + 1e-9
        )
