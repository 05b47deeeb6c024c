"""Advantages of the trainer on the recorded cases: one reward a trajectory, its group's mean, its units alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pgrpo import pgrpo_trainer
from tw_recipes.grpo.pgrpo_trainer import groups_with_signal

CASES = json.loads((Path(__file__).parents[2] / "data" / "advantage_cases.json").read_text())["advantages"]
EPS, OURS = 1e-6, 1e-4  # added to the standard deviation: the recorded code, TRL


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return pgrpo_trainer(tmp_path_factory.mktemp("advantages"), log_rollouts=0)


def trajectories(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Prompt -> trajectory -> reward; the recorded code repeats the reward on every unit of a trajectory."""
    groups: dict[str, dict[str, float]] = {}
    for prompt, name, reward in zip(case["uid"], case["base_seq_uid"], case["reward"], strict=True):
        assert groups.setdefault(prompt, {}).setdefault(name, reward) == reward
    return groups


def advantages(trainer: Any, groups: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What the trainer makes of these rewards; groups of fewer than the widest hold failed rollouts."""
    size = max(2, *(len(group) for group in groups))
    table = torch.full((len(groups) * size, 1), torch.nan)
    for number, group in enumerate(groups):
        table[number * size : number * size + len(group), 0] = torch.tensor(group)
    monkeypatch.setattr(trainer, "num_generations", size)
    monkeypatch.setattr(trainer, "reward_funcs", trainer.reward_funcs[:1])
    monkeypatch.setattr(trainer, "reward_func_names", ["recorded"])
    monkeypatch.setattr(trainer, "reward_weights", torch.ones(1))
    monkeypatch.setattr("tw_recipes.grpo.trainer.TrieGRPOTrainer._calculate_rewards", lambda self, *args: table)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "x", "answer": "7"} for _ in table])
    found = batch["advantages"].view(len(groups), size).tolist()
    assert all(value == 0 for row, group in zip(found, groups, strict=True) for value in row[len(group) :])
    return [row[: len(group)] for row, group in zip(found, groups, strict=True)]


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_recorded_advantages(trainer, number, scale, monkeypatch):
    """A prompt with one trajectory has no baseline: the recorded code keeps its reward, here it teaches nothing."""
    case = CASES[number]
    recorded = case["from_last_mean_only" if scale == "none" else "from_last_with_std"]
    if recorded is None:  # every row is its trajectory's last
        recorded = case["all_rows_mean_only" if scale == "none" else "all_rows_with_std"]
    groups = trajectories(case)
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    monkeypatch.setattr(trainer.args, "signal_threshold", case["zero_adv_if_all_ge_le"])
    found = advantages(trainer, [list(group.values()) for group in groups.values()], monkeypatch)
    by_name = {}
    for own, (prompt, group) in zip(found, groups.items(), strict=True):
        spread = float(torch.tensor(list(group.values())).std()) if len(group) > 1 else 0.0
        factor = 1.0 if scale == "none" else (spread + OURS) / (spread + EPS)
        by_name |= {(prompt, name): value * factor for name, value in zip(group, own, strict=True)}
    for prompt, name, wanted in zip(case["uid"], case["base_seq_uid"], recorded, strict=True):
        wanted = 0.0 if len(groups[prompt]) == 1 else wanted
        assert by_name[prompt, name] == pytest.approx(wanted, abs=2e-6, rel=2e-6)


def test_signal_of_a_group():
    nan = float("nan")
    rewards = torch.tensor([[1.1, 1.1, 1.1], [1.0, 1.1, 1.0], [nan, 1.0, nan], [nan, 1.0, 0.0], [nan, nan, nan]])
    assert groups_with_signal(rewards).tolist() == [False, True, False, True, False]
    assert groups_with_signal(rewards, 1.0).tolist() == [False, False, False, False, False]
    assert groups_with_signal(rewards, 0.5).tolist() == [False, False, False, True, False]


def test_all_right_and_all_wrong_groups_have_no_advantage_even_when_scaled(trainer, monkeypatch):
    """A mean of equal float32 numbers is off by a rounding, which TRL's division by 1e-4 would make visible."""
    monkeypatch.setattr(trainer, "scale_rewards", "group")
    monkeypatch.setattr(trainer.args, "signal_threshold", None)
    groups = [[1.1] * 7, [0.0] * 7, [-1.0] * 7, [1.1, *[1.0] * 6]]
    found = advantages(trainer, groups, monkeypatch)
    assert found[:3] == [[0.0] * 7] * 3
    assert found[3][0] > 1
