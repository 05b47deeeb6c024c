"""Reward functions on texts and rollout rows, as TRL calls them."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.pgrpo import TEXTS, tokenizer
from tw_core import TagIds
from tw_recipes.evaluation.grading import ExactGrader, Grade, GraderPool
from tw_recipes.rewards import (
    Judge,
    acceleration_reward,
    correctness_reward,
    format_reward,
    length_penalties,
    length_penalty,
)

CASES = json.loads((Path(__file__).parents[2] / "data" / "advantage_cases.json").read_text())["length_penalty"]


class CountingGrader(ExactGrader):
    def __init__(self) -> None:
        self.asked: list[str] = []

    def grade(self, response: str, answer: str) -> Grade:
        self.asked.append(response)
        return super().grade(response, answer)


def row(total: int, latency: int, ok: bool = True) -> dict:
    return {"stats": {"total_tokens": total}, "token_latency": latency, "format_ok": ok}


def test_only_the_text_after_think_counts():
    reward = correctness_reward(ExactGrader(), incorrect=-1.0)
    completions = [
        "<think>\n\\boxed{7}\n</think>\n\nso \\boxed{8}",
        "<think>\\boxed{8}\n</think>\n\n\\boxed{7}",
        "\\boxed{7}",
    ]
    assert reward(completions=completions, answer=["7"] * 3) == [-1.0, 1.0, 1.0]
    chat = [[{"role": "assistant", "content": text}] for text in completions]
    assert reward(completions=chat, answer=["7"] * 3) == [-1.0, 1.0, 1.0]
    assert reward.__name__ == "correctness_reward"


def test_no_answer_no_reward_and_an_empty_response_is_wrong():
    metrics = defaultdict(list)
    reward = correctness_reward(ExactGrader())
    assert reward(completions=[[]], answer=["7"]) == [0.0], "a chat without a turn"
    columns = {"completions": ["\\boxed{7}", "", "\\boxed{7}"], "answer": ["7", "7", None]}
    assert reward(**columns, log_metric=lambda name, value: metrics[name].append(value)) == [1.0, 0.0, None]
    assert dict(metrics) == {
        "accuracy": [0.5],
        "grading/unparsable": [0.5],
        "grading/timeout": [0.0],
        "grading/error": [0.0],
    }
    with pytest.raises(KeyError, match=r"needs a column 'answer'.*got the columns"):
        reward(completions=["7"], solution=["7"])


def test_answers_may_be_numbers():
    """A data set's column of integers made every answer wrong: the graders compare text."""
    assert correctness_reward(ExactGrader())(completions=["\\boxed{7}", "\\boxed{8}"], answer=[7, 7]) == [1.0, 0.0]


def test_a_grading_that_runs_out_of_time_is_wrong_and_the_run_goes_on():
    metrics = {}
    slow = "\\boxed{" + "+".join(f"\\sqrt[{k}]{{{k}^{{9^{{9}}}}}}" for k in range(2, 40)) + "}"
    with GraderPool(workers=1, timeout_s=0.5) as pool:
        reward = correctness_reward(pool, incorrect=-1.0)
        rewards = reward(completions=[slow, "\\boxed{7}"], answer=["7", "7"], log_metric=metrics.__setitem__)
    assert rewards == [-1.0, 1.0]
    assert metrics["grading/timeout"] + metrics["grading/error"] == 0.5


def test_a_judge_grades_each_response_once():
    grader = CountingGrader()
    judge = Judge(grader, memory=2)
    columns = {
        "completions": ["\\boxed{7}", "\\boxed{7}", "\\boxed{8}"],
        "completion_ids": [[]] * 3,
        "answer": ["7"] * 3,
    }
    correctness_reward(judge)(**columns)
    acceleration_reward(judge)(**columns, rollout=[row(10, 10)] * 3)
    assert grader.asked == ["\\boxed{7}", "\\boxed{8}"]
    judge.grades(["a", "b"], ["7", "7"])
    judge.grades(["\\boxed{7}"], ["7"])
    assert len(grader.asked) == 5  # the memory holds two


def test_acceleration_is_paid_to_right_answers_and_capped():
    reward = acceleration_reward(ExactGrader(), rho=0.5, eta_max=0.2)
    rows = [row(100, 100), row(100, 90), row(100, 20), row(100, 20), row(0, 0)]
    texts = ["\\boxed{7}", "\\boxed{7}", "\\boxed{7}", "\\boxed{8}", "\\boxed{7}"]
    rewards = reward(completions=texts, completion_ids=[[]] * 5, rollout=rows, answer=["7"] * 5)
    assert rewards == pytest.approx([0.0, 0.05, 0.1, 0.0, 0.0])


def test_acceleration_from_ids_needs_tags_and_does_not_see_the_prompt():
    ids = [tokenizer().encode(text, add_special_tokens=False) for text in TEXTS[:2]]
    columns = {"completions": list(TEXTS[:2]), "completion_ids": ids, "answer": ["7"] * 2}
    with pytest.raises(ValueError, match=r"needs the column `rollout`.*tag_ids="):
        acceleration_reward(ExactGrader())(**columns)
    tags = TagIds.from_tokenizer(tokenizer())
    rewards = acceleration_reward(ExactGrader(), rho=1.0, eta_max=1.0, tag_ids=tags)(**columns)
    assert rewards[0] > 0 == rewards[1]


@pytest.mark.parametrize("options", [{"rho": -0.1}, {"eta_max": 0.0}, {"eta_max": 1.5}])
def test_acceleration_refuses_impossible_weights(options):
    with pytest.raises(ValueError, match="rho must be >= 0 and eta_max in"):
        acceleration_reward(ExactGrader(), **options)


def test_format_reward_reads_the_rollout_or_the_text():
    reward = format_reward(well_formed=0.1, malformed=-0.1)
    broken = TEXTS[0].replace("</Parallel>", "")
    assert reward(completions=[*TEXTS, broken]) == [0.1] * 4 + [-0.1]
    assert reward(completions=[broken] * 2, rollout=[row(1, 1), row(1, 1, ok=False)]) == [0.1, -0.1]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_length_penalties_equal_the_recorded_ones(number):
    case = CASES[number]
    options = {name: case[name] for name in ("tau", "beta", "window")}
    found = length_penalties(case["group"], case["length"], case["correct"], **options)
    assert found == pytest.approx(case["penalty"], abs=1e-12)
    assert case["eps"] == 1e-6


def test_length_penalties_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\) and beta >= 0, got 1.0 and 0.2"):
        length_penalties([1], [5], [True], tau=1.0)
    with pytest.raises(ValueError, match="must have one entry a response each, got 2, 1 and 2"):
        length_penalties([1, 1], [5], [True, True])


def test_length_penalty_groups_equal_prompts():
    reward = length_penalty(ExactGrader(), beta=1.0, window=100.0, tau=0.5)
    columns = {"prompts": ["a", "a", "b", "b"], "completions": ["\\boxed{7}"] * 4, "answer": ["7", "7", "7", None]}
    ids = [[0] * 10, [0] * 60, [0] * 10, [0] * 60]
    assert reward(**columns, completion_ids=ids) == pytest.approx([0.0, -0.5, 0.0, None])
    rows = [row(10, 10), row(60, 10), row(10, 10), row(10, 10)]
    total = reward(**columns, completion_ids=ids, rollout=rows)
    latency = length_penalty(ExactGrader(), beta=1.0, window=100.0, tau=0.5, latency=True)
    assert (total[1], latency(**columns, completion_ids=ids, rollout=rows)[1]) == pytest.approx((-0.5, 0.0))
