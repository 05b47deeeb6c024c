"""Rate limits on a clock of the test's own; a budget that is kept whatever is in flight."""

import asyncio
import random

import pytest

from tw_recipes.datagen.limits import Budget, BudgetExhaustedError, RateLimiter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("requests", "tokens", "expected"),
    [(60, None, 119.0), (None, 6000, 119.0), (120, 6000, 119.0), (6000, 60000, 10.9)],
)
async def test_the_rate_is_kept_over_minutes_without_bursts(requests, tokens, expected):
    clock = Clock()
    limiter = RateLimiter(requests, tokens, clock=clock, sleep=clock.sleep)
    times = []
    for _ in range(120):
        await limiter.acquire(100)
        times.append(clock.now)
    assert times[-1] == pytest.approx(expected, rel=0.02)
    rate = requests or 10**9
    assert all(times[i + 60] - times[i] >= 59 * 60 / rate - 1e-6 for i in range(60))


async def test_tokens_that_were_not_used_are_given_back_and_a_large_call_leaves_a_debt():
    clock = Clock()
    limiter = RateLimiter(None, 600, clock=clock, sleep=clock.sleep)
    await limiter.acquire(10)
    limiter.settle(10, 0)
    await limiter.acquire(10)
    assert clock.now == 0
    await limiter.acquire(6000)
    assert clock.now == pytest.approx(1)
    await limiter.acquire(10)
    assert clock.now == pytest.approx(601)


async def test_without_limits_nothing_waits():
    clock = Clock()
    limiter = RateLimiter(clock=clock, sleep=clock.sleep)
    await asyncio.gather(*(limiter.acquire(10**9) for _ in range(100)))
    assert clock.now == 0


@pytest.mark.parametrize("seed", range(3))
async def test_a_budget_is_never_exceeded_and_almost_used_up(seed):
    budget, random_ = Budget(max_tokens=10_000), random.Random(seed)
    done = []

    async def call() -> None:
        most = random_.randint(100, 900)
        await budget.reserve(most, 0.0)
        await asyncio.sleep(0)
        used = random_.randint(1, most)
        assert budget.tokens + used <= 10_000
        await budget.settle((most, 0.0), (used, 0.0))
        done.append(used)

    found = await asyncio.gather(*(call() for _ in range(100)), return_exceptions=True)
    stopped = [error for error in found if error is not None]
    assert stopped
    assert all(isinstance(error, BudgetExhaustedError) for error in stopped)
    assert budget.tokens == sum(done)
    assert 9_000 < budget.tokens <= 10_000


async def test_money_counts_as_tokens_do_and_earlier_runs_count_too():
    budget = Budget(max_cost=1.0, cost=0.75)
    await budget.reserve(10, 0.25)
    await budget.settle((10, 0.25), (5, 0.2))
    with pytest.raises(BudgetExhaustedError, match=r"5 tokens .* 0.95 \(max_cost=1.0\); raise it and run the same"):
        await budget.reserve(10, 0.25)


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
def test_a_rate_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive or None, got 0"):
        RateLimiter(**{name: 0})
