"""Rewards of fork/join responses as TRL reward functions, for `PGRPOTrainer` and any other GRPO trainer.

    judge = Judge(task.grader())                               one memory of grades for all functions of a run
    reward_funcs = [correctness_reward(judge), acceleration_reward(judge, rho=0.5, eta_max=0.2)]

    r = 1 if correct else `incorrect`   +   [correct] * rho * min(eta, eta_max)          (SPEC section 6)

Each function takes TRL's columns and returns one float a response, or None where it does not apply. Those that measure
a response read the column `rollout` (rows of `tw_recipes.rollout.trajectory_row`) that `PGRPOTrainer` adds. Source:
arXiv:2512.07843, section on P-GRPO. Tests: tests/recipes/rewards.
"""

from tw_recipes.rewards.acceleration import acceleration_reward
from tw_recipes.rewards.correctness import Judge, correctness_reward
from tw_recipes.rewards.format import format_reward
from tw_recipes.rewards.guard import RewardError, guarded
from tw_recipes.rewards.length import length_penalties, length_penalty

__all__ = [
    "Judge",
    "RewardError",
    "acceleration_reward",
    "correctness_reward",
    "format_reward",
    "guarded",
    "length_penalties",
    "length_penalty",
]
