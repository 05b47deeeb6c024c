"""The engine that decodes with a copy of the model in training, and micro-batches of one prompt, as on a GPU."""

import asyncio
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tw_recipes.decoding.engine import Request, Sampling
from tw_recipes.decoding.lockstep_engine import LockstepEngine
from tw_recipes.evaluation.grading import ExactGrader, Grade
from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.reproduce import measure, reinforcement, rows
from tw_recipes.pipelines.reproduce.reinforcement import FollowingEngine, grpo_trainer
from tw_recipes.pipelines.reproduce.settings import ModelSize, Reinforcement, Settings
from tw_recipes.tasks.model import tiny_model

SETTINGS = Settings(
    model=ModelSize(hidden_size=16, layers=1, heads=2, context=700),
    reinforcement=Reinforcement(steps=2, prompts=2, generations=2, lr=1e-2),
)


class Chance(ExactGrader):
    """Random text is right by chance, so that there is a gradient."""

    def grade(self, response: str, answer: str) -> Grade:
        return Grade(sum(map(ord, response)) % 2 == 0, "graded", "")


def _completion(engine: LockstepEngine, eos: int) -> list[int]:
    request = Request(np.array([5, 6, 7]), (eos,), 12, Sampling(1.0), seed=3)
    return asyncio.run(engine.generate(request)).ids.tolist()


def test_a_following_engine_decodes_with_the_weights_of_the_moment() -> None:
    tokenizer = SETTINGS.make_task().tokenizer()
    source = tiny_model(tokenizer, hidden_size=16, layers=1, heads=2, context=64, init=0.5)
    copied = tiny_model(tokenizer, seed=1, hidden_size=16, layers=1, heads=2, context=64, init=0.5)
    places = [p.data_ptr() for p in copied.parameters()]
    eos = tokenizer.eos_token_id
    engine = FollowingEngine(copied, source, eos_ids=[eos])
    first = _completion(engine, eos)
    assert first == _completion(LockstepEngine(source, eos_ids=[eos]), eos)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(-1.5)
    second = _completion(engine, eos)
    assert second == _completion(LockstepEngine(source, eos_ids=[eos]), eos)
    assert second != first
    assert [p.data_ptr() for p in copied.parameters()] == places  # CUDA graphs read them there


def test_a_copy_of_another_shape_is_refused() -> None:
    tokenizer = SETTINGS.make_task().tokenizer()
    models = [tiny_model(tokenizer, hidden_size=width, layers=1, heads=2, context=64) for width in (16, 32)]
    with pytest.raises(ValueError, match=r"copy must have the parameters of source, .* load both from one checkpoint"):
        FollowingEngine(models[0], models[1], eos_ids=[0])


def test_micro_batches_and_a_copy_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's way, in float32 on a CPU, gives the rollouts and, but for rounding, the weights of the CPU's."""
    task = SETTINGS.make_task()
    tokenizer = task.tokenizer()
    start = tiny_model(tokenizer, hidden_size=16, layers=1, heads=2, context=700, init=0.3)
    problems = rows.reinforcement_problems(SETTINGS)
    limits = replace(
        measure.limits_for(rows.held_out_problems(SETTINGS)[:4], tokenizer, fork=True), max_total_tokens=40
    )

    def run(name: str, micro_batches: int) -> tuple[list[float], list[torch.Tensor]]:
        model, copied = copy.deepcopy(start), copy.deepcopy(start) if micro_batches > 1 else None
        with monkeypatch.context() as patch:
            patch.setattr(reinforcement, "micro_batches_of", lambda settings: micro_batches)
            trainer = grpo_trainer(
                SETTINGS,
                model,
                problems,
                tmp_path / name,
                forking=True,
                tokenizer=tokenizer,
                grader=Chance(),
                limits=limits,
                copied=copied,
            )
            trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        return rewards, [p.detach().clone() for p in model.parameters()]

    whole, cut = quietly(run)("whole", 1), quietly(run)("cut", 2)
    assert cut[0] == pytest.approx(whole[0])
    moved = [not torch.equal(a, b) for a, b in zip(whole[1], start.parameters(), strict=True)]
    assert any(moved)
    for a, b in zip(whole[1], cut[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # the steps are up to 1e-2 long
