"""The parallelization-aware bonus: right answers earn by the share of tokens that ran beside others.

Tests: tests/recipes/rewards/test_rewards.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tw_core import TagIds, parallel_stats
from tw_recipes.evaluation.grading import Grader
from tw_recipes.rewards.correctness import Judge, RewardFunction, answers_of, as_judge, response_text


def acceleration_reward(
    grader: Judge | Grader | None = None,
    *,
    rho: float = 0.5,
    eta_max: float = 0.2,
    tag_ids: TagIds | None = None,
    answer_column: str = "answer",
) -> RewardFunction:
    """A reward function: rho * min(eta, eta_max) for a right answer, 0 for a wrong one.

    eta = 1 - L / T of the response alone, from token ids. With the column `rollout`, L is the token latency of what was
    run: tags that were decoded in one call (a sequential run) earn nothing.

    Args:
        grader: As in `correctness_reward`; pass both the same `Judge`.
        rho: Weight; the published runs use 0.5.
        eta_max: Acceleration above it earns no more; the published runs use 0.2, so that the bonus is at most 0.1.
        tag_ids: For trainers without the column `rollout`, whose completion ids are the joined response.
        answer_column: Column of the reference answer.

    Returns:
        A TRL reward function named "acceleration_reward"; it raises ValueError if it can measure nothing.

    Raises:
        ValueError: `rho` is negative or `eta_max` outside (0, 1].

    Source:
        SPEC sections 5 and 6; arXiv:2512.07843.
    """
    if rho < 0 or not 0 < eta_max <= 1:
        raise ValueError(f"rho must be >= 0 and eta_max in (0, 1], got {rho} and {eta_max}")
    judge = as_judge(grader)

    def reward(
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        rollout: Sequence[Mapping[str, Any]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        grades = judge.grades([response_text(item) for item in completions], answers_of(columns, answer_column))
        etas = [acceleration(row) for row in rollout] if rollout is not None else _from_ids(completion_ids, tag_ids)
        return [
            None if grade is None else rho * min(eta, eta_max) if grade.correct else 0.0
            for grade, eta in zip(grades, etas, strict=True)
        ]

    reward.__name__ = "acceleration_reward"
    return reward


def acceleration(row: Mapping[str, Any]) -> float:
    """eta of a row of `trajectory_row`: 1 - token latency of what was run / all tokens; 0 for an empty response."""
    total = row["stats"]["total_tokens"]
    return 1 - row["token_latency"] / total if total else 0.0


def _from_ids(completion_ids: Sequence[Any], tag_ids: TagIds | None) -> list[float]:
    if tag_ids is None:
        raise ValueError(
            "acceleration_reward needs the column `rollout`, which PGRPOTrainer gives; with another trainer pass "
            "tag_ids=TagIds.from_tokenizer(tokenizer)"
        )
    return [parallel_stats(ids, tag_ids).acceleration for ids in completion_ids]
