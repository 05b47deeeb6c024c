"""A reward function that raises, hangs or returns nonsense: named, counted, never a silent number."""

import asyncio
import threading

import pytest

from tw_recipes.rewards import RewardError, guarded

COLUMNS = {"completions": ["a", "b"], "prompts": ["p", "p"]}


def broken(completions, **_):
    raise ZeroDivisionError("no tokens")


def test_a_raising_function_is_named():
    with pytest.raises(RewardError, match="reward function 'broken' raised ZeroDivisionError: no tokens; repair it"):
        guarded(broken)(**COLUMNS)


def test_a_raising_function_can_be_left_out_and_is_counted():
    metrics = {}
    reward = guarded(broken, on_error="none")
    assert reward(**COLUMNS, log_metric=metrics.__setitem__) == [None, None]
    assert metrics == {"reward_errors/broken": 1.0}
    assert reward.__name__ == "broken"


@pytest.mark.parametrize("on_error", ["raise", "none"])
def test_a_function_that_hangs_is_left_behind(on_error):
    release = threading.Event()

    def hangs(completions, **_):
        release.wait(30)
        return [0.0] * len(completions)

    reward = guarded(hangs, timeout_s=0.05, on_error=on_error)
    try:
        if on_error == "raise":
            with pytest.raises(RewardError, match=r"'hangs' took more than timeout_s=0.05"):
                reward(**COLUMNS)
        else:
            assert reward(**COLUMNS) == [None, None]
    finally:
        release.set()


def test_async_functions_are_bounded_too():
    async def slow(completions, **_):
        await asyncio.sleep(30)

    async def fast(completions, **_):
        return [1, None]

    assert asyncio.run(guarded(fast, timeout_s=5.0)(**COLUMNS)) == [1.0, None]
    with pytest.raises(RewardError, match=r"'slow' took more than timeout_s=0.05"):
        asyncio.run(guarded(slow, timeout_s=0.05)(**COLUMNS))


def test_none_is_not_applicable_and_a_thread_returns_what_the_function_returns():
    assert guarded(lambda completions, **_: [0.5, None], timeout_s=5.0)(**COLUMNS) == [0.5, None]


@pytest.mark.parametrize("on_error", ["raise", "none"])
@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], r"one reward per response \(2\), got 1"), ([1.0, float("nan")], "returned nan for response 1")],
)
def test_what_is_no_reward_always_raises(values, message, on_error):
    """TRL would read NaN as "not applicable"."""
    with pytest.raises(RewardError, match=message):
        guarded(lambda completions, **_: values, on_error=on_error)(**COLUMNS)


def test_options_are_checked():
    with pytest.raises(ValueError, match="timeout_s must be > 0 or None"):
        guarded(broken, timeout_s=0)
    with pytest.raises(ValueError, match='on_error must be "raise" or "none"'):
        guarded(broken, on_error="ignore")
