"""An optional penalty for long responses to problems that the policy solves anyway.

Tests: tests/recipes/rewards/test_rewards.py, with the recorded cases of tests/data/advantage_cases.json.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from tw_recipes.evaluation.grading import Grader
from tw_recipes.rewards.correctness import Judge, RewardFunction, answers_of, as_judge, response_text

_EPS = 1e-6


def length_penalties(
    groups: Sequence[Hashable],
    lengths: Sequence[float],
    correct: Sequence[bool],
    *,
    tau: float = 0.8,
    beta: float = 0.2,
    window: float = 10_000.0,
) -> list[float]:
    """Penalties >= 0, larger the further accuracy is above tau and a length above the shortest right one of its group.

    penalty = beta * (accuracy - tau) / (1 - tau) * min(1, (length - shortest right length) / window), 0 where the
    accuracy is below tau, where no response is right, or without a window. Wrong responses are penalised alike.

    Args:
        groups: Which responses answer the same prompt. One entry a response, as in the next two.
        lengths: Length of each response.
        correct: Whether it is right.
        tau: Accuracy from which a group is penalised, in [0, 1).
        beta: The largest penalty.
        window: Excess length that is penalised in full; 0 turns the penalty off.

    Raises:
        ValueError: `tau` or `beta` is out of range, or the three sequences differ in length.
    """
    if not (0 <= tau < 1 and beta >= 0):
        raise ValueError(f"tau must be in [0, 1) and beta >= 0, got {tau} and {beta}")
    if not len(groups) == len(lengths) == len(correct):
        got = f"{len(groups)}, {len(lengths)} and {len(correct)}"
        raise ValueError(f"groups, lengths and correct must have one entry a response each, got {got}")
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    found = [0.0] * len(groups)
    for places in members.values():
        right = [lengths[place] for place in places if correct[place]]
        accuracy = len(right) / len(places)
        if not right or accuracy < tau or window <= 0:
            continue
        scale = beta * (accuracy - tau + _EPS) / (1 - tau + _EPS)
        for place in places:
            found[place] = scale * min(1.0, max(0.0, lengths[place] - min(right)) / window)
    return found


def length_penalty(
    grader: Judge | Grader | None = None,
    *,
    tau: float = 0.8,
    beta: float = 0.2,
    window: float = 10_000.0,
    latency: bool = False,
    answer_column: str = "answer",
) -> RewardFunction:
    """A reward function: minus the `length_penalties` of the responses of this process.

    Groups are the equal prompts of the call, so keep a prompt's generations on one process.

    Args:
        grader: As in `correctness_reward`; pass both the same `Judge`.
        tau: As in `length_penalties`, like the next two.
        beta: The largest penalty.
        window: Excess length that is penalised in full.
        latency: With the column `rollout`, measure the token latency instead of all tokens.
        answer_column: Column of the reference answer.

    Returns:
        A TRL reward function named "length_penalty". A row without an answer has no reward.
    """
    judge = as_judge(grader)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        rollout: Sequence[Mapping[str, Any]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        grades = judge.grades([response_text(item) for item in completions], answers_of(columns, answer_column))
        if rollout is None:
            lengths = [float(len(ids)) for ids in completion_ids]
        else:
            lengths = [row["token_latency"] if latency else row["stats"]["total_tokens"] for row in rollout]
        correct = [grade is not None and grade.correct for grade in grades]
        penalties = length_penalties(
            [repr(prompt) for prompt in prompts], lengths, correct, tau=tau, beta=beta, window=window
        )
        return [None if grade is None else -value for grade, value in zip(grades, penalties, strict=True)]

    reward.__name__ = "length_penalty"
    return reward
