"""Is the answer right? `Judge` remembers grades; `correctness_reward` turns them into a reward.

Tests: tests/recipes/rewards/test_rewards.py.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from tw_recipes.evaluation.grading import Grade, Grader, GraderPool

RewardFunction = Callable[..., list[float | None]]


class Judge:
    """A grader with a memory, so that the reward functions of a step grade each response once.

    Args:
        grader: Any `tw_recipes.evaluation.grading.Grader`. None: math-verify in a `GraderPool`.
        memory: Grades that are kept.
    """

    def __init__(self, grader: Grader | None = None, *, memory: int = 8192) -> None:
        self.grader: Grader = GraderPool() if grader is None else grader
        self.memory = memory
        self._known: OrderedDict[tuple[str, str], Grade] = OrderedDict()

    def grades(self, responses: Sequence[str], answers: Sequence[Any]) -> list[Grade | None]:
        """Grades in order; None where there is no reference answer.

        Args:
            responses: What the model wrote, without the prompt; the text after `</think>` counts.
            answers: Reference answers, one a response; numbers are read as they are written.

        Raises:
            ValueError: There are not as many answers as responses.
        """
        if len(responses) != len(answers):
            raise ValueError(f"answers must have one entry per response ({len(responses)}), got {len(answers)}")
        pairs = [
            None if answer is None else (text, str(answer)) for text, answer in zip(responses, answers, strict=True)
        ]
        new = list(dict.fromkeys(pair for pair in pairs if pair is not None and pair not in self._known))
        for pair, grade in zip(new, self._grade(new), strict=True):
            self._known[pair] = grade
        found = [None if pair is None else self._known[pair] for pair in pairs]
        while len(self._known) > self.memory:
            self._known.popitem(last=False)
        return found

    def _grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        if isinstance(self.grader, GraderPool) and pairs:
            return self.grader.grade_many(*zip(*pairs, strict=True))
        return [self.grader.grade(text, answer) for text, answer in pairs]

    def close(self) -> None:
        """Release what the grader holds."""
        self.grader.close()


def correctness_reward(
    grader: Judge | Grader | None = None,
    *,
    incorrect: float = 0.0,
    correct: float = 1.0,
    answer_column: str = "answer",
) -> RewardFunction:
    """A reward function: `correct` for a right answer, `incorrect` for anything else.

    A response that cannot be read, or whose grading ran out of time or died, is not right; such cases are counted in
    the metrics `grading/unparsable`, `grading/timeout` and `grading/error`, beside `accuracy`. A row whose answer is
    None has no reward.

    Args:
        grader: What compares; pass one `Judge` to several functions. None: math-verify.
        incorrect: The published runs use -1.
        correct: Reward of a right answer.
        answer_column: Column of the data set with the reference answer.

    Returns:
        A TRL reward function named "correctness_reward"; it raises KeyError without `answer_column`.

    Source:
        SPEC section 6; arXiv:2512.07843.
    """
    judge = as_judge(grader)

    def reward(completions: Sequence[Any], log_metric: Any = None, **columns: Any) -> list[float | None]:
        grades = judge.grades([response_text(item) for item in completions], answers_of(columns, answer_column))
        if log_metric is not None:
            _log(grades, log_metric)
        return [None if grade is None else correct if grade.correct else incorrect for grade in grades]

    reward.__name__ = "correctness_reward"
    return reward


def as_judge(grader: Judge | Grader | None) -> Judge:
    """`grader` itself if it is a `Judge`, else a `Judge` around it."""
    return grader if isinstance(grader, Judge) else Judge(grader)


def response_text(completion: Any) -> str:
    """The text of a TRL completion: a string, or messages of which the last one's content counts; "" for none."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"] or "") if completion else ""


def answers_of(columns: dict[str, Any], name: str) -> Sequence[str | None]:
    """The column of reference answers.

    Raises:
        KeyError: There is none.
    """
    if name not in columns:
        raise KeyError(
            f"the data set needs a column {name!r} with the reference answers, got the columns "
            f"{sorted(set(columns) - _TRL)}; rename it, or set answer_column"
        )
    return columns[name]


_TRL = {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "rollout"}


def _log(grades: Sequence[Grade | None], log_metric: Callable[[str, float], None]) -> None:
    graded = [grade for grade in grades if grade is not None]
    statuses = Counter(grade.status for grade in graded)
    if graded:
        log_metric("accuracy", sum(grade.correct for grade in graded) / len(graded))
        for status in ("unparsable", "timeout", "error"):
            log_metric(f"grading/{status}", statuses[status] / len(graded))
