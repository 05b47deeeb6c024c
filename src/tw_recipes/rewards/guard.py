"""What happens when a reward function raises, hangs, or returns something that is no reward.

TRL reads NaN as "not applicable" and lets an exception end the run without saying which function it was. A guarded
function checks every value and names itself; `on_error="none"` turns a failed call into "not applicable" for the whole
batch and counts it in the metric `reward_errors/<name>`.

Tests: tests/recipes/rewards/test_guard.py.
"""

import asyncio
import functools
import inspect
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tw_core.errors import ThreadWeaverError
from tw_recipes.rewards.correctness import RewardFunction

logger = logging.getLogger(__name__)

OnError = Literal["raise", "none"]


class RewardError(ThreadWeaverError, RuntimeError):
    """A reward function failed, ran out of time, or returned what is no reward; the message names it."""


def guarded(
    function: Callable[..., Any], *, timeout_s: float | None = None, on_error: OnError = "raise"
) -> RewardFunction:
    """The same reward function, sync or async, with defined failures.

    Args:
        function: A TRL reward function.
        timeout_s: Seconds for one call. The function then runs in a thread of its own, which is left behind when its
            time is over (no thread can be stopped); code that needs the main thread (signals) must bound itself.
        on_error: "raise", or "none": every response of the batch has no reward from this function.

    Returns:
        A function with the same name. It raises RewardError if `on_error="raise"`; a wrong number of rewards or a value
        that is neither finite nor None always raises.

    Raises:
        ValueError: `timeout_s` is not positive, or `on_error` is unknown.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s must be > 0 or None, got {timeout_s}")
    if on_error not in ("raise", "none"):
        raise ValueError(f'on_error must be "raise" or "none", got {on_error!r}')
    name = getattr(function, "__name__", type(function).__name__)

    def failed(error: Exception, columns: dict[str, Any]) -> list[float | None]:
        late = isinstance(error, TimeoutError) and timeout_s is not None
        reason = f"took more than timeout_s={timeout_s:g}" if late else f"raised {type(error).__name__}: {error}"
        if on_error == "raise":
            raise RewardError(
                f'reward function {name!r} {reason}; repair it, or set reward_errors="none" to go on without it'
            ) from error
        logger.warning("reward function %r %s; its rewards of this batch are left out", name, reason)
        if (log_metric := columns.get("log_metric")) is not None:
            log_metric(f"reward_errors/{name}", 1.0)
        return [None] * len(columns["completions"])

    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is async
    )
    if is_async:

        @functools.wraps(function)
        async def reward(**columns: Any) -> list[float | None]:
            try:
                values = await asyncio.wait_for(function(**columns), timeout_s)
            except Exception as error:
                return failed(error, columns)
            return _checked(values, name, len(columns["completions"]))
    else:

        @functools.wraps(function)
        def reward(**columns: Any) -> list[float | None]:
            try:
                values = function(**columns) if timeout_s is None else _in_thread(function, columns, timeout_s)
            except Exception as error:
                return failed(error, columns)
            return _checked(values, name, len(columns["completions"]))

    reward.__name__ = name
    return reward


def _in_thread(function: Callable[..., Any], columns: dict[str, Any], timeout_s: float) -> Any:
    answer: list[Any] = []
    problem: list[BaseException] = []

    def call() -> None:
        try:
            answer.append(function(**columns))
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=call, daemon=True, name="reward")
    thread.start()
    thread.join(timeout_s)
    if problem:
        raise problem[0]
    if not answer:
        raise TimeoutError
    return answer[0]


def _checked(values: Sequence[Any], name: str, expected: int) -> list[float | None]:
    if len(values) != expected:
        raise RewardError(
            f"reward function {name!r} must return one reward per response ({expected}), got {len(values)}"
        )
    found = [None if value is None else float(value) for value in values]
    for place, value in enumerate(found):
        if value is not None and not math.isfinite(value):
            raise RewardError(
                f"reward function {name!r} returned {value} for response {place}; return a finite number, or None "
                "where it does not apply"
            )
    return found
