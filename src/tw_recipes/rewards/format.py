"""An optional reward for well-formed fork/join text.

Tests: tests/recipes/rewards/test_rewards.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tw_core import check_format
from tw_recipes.rewards.correctness import RewardFunction, response_text


def format_reward(*, well_formed: float = 1.0, malformed: float = 0.0) -> RewardFunction:
    """A reward function: `well_formed` for a response that follows SPEC section 1, else `malformed`.

    With the column `rollout` a closer that the decoder had to force makes a response malformed; without it the text is
    checked. A response without any block is well-formed.

    Args:
        well_formed: Reward of a response without a problem.
        malformed: Reward of any other.

    Returns:
        A TRL reward function named "format_reward".
    """

    def reward(
        completions: Sequence[Any], rollout: Sequence[Mapping[str, Any]] | None = None, **columns: Any
    ) -> list[float | None]:
        if rollout is not None:
            good = [bool(row["format_ok"]) for row in rollout]
        else:
            good = [check_format(response_text(item), numbering="any").ok for item in completions]
        return [well_formed if ok else malformed for ok in good]

    reward.__name__ = "format_reward"
    return reward
