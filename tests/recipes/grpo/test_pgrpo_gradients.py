"""The gradient of an update equals SPEC section 6 written out unit by unit, in float64."""

from typing import Any

import pytest
import torch

from tests.support.grpo import GROUP, train
from tests.support.pgrpo import (
    TEXTS,
    by_place,
    exact_head,
    failing,
    finished_units,
    formula_gradients,
    pgrpo_trainer,
    policy,
    scripted,
    tokenizer,
)
from tw_core import Unit


def units_of(prompt: str, text: str, forking: bool = True) -> list[Unit]:
    """What the scripted engine is asked and writes, end of sequence included."""
    ids, eos = tokenizer().encode(prompt, add_special_tokens=False), tokenizer().eos_token_id
    if not forking:
        return [Unit(ids, [*tokenizer().encode(text, add_special_tokens=False), eos])]
    return finished_units(prompt, text)


def reward_of(text: str, forking: bool = True) -> float:
    """1 if right + rho * min(eta, eta_max), all numbers of which float32 holds exactly."""
    right = "7}" in text
    return right * (1.0 + (0.125 if forking and "<Parallel>" in text else 0.0))


def expected(prompts: list[str], model: Any = None, forking: bool = True, drop: tuple[int, ...] = ()) -> dict[str, Any]:
    """Gradients of the first batch, whose rollouts are `TEXTS` in turn, those at `drop` left out."""
    groups = []
    for number, prompt in enumerate(prompts):
        places = [number * GROUP + k for k in range(GROUP)]
        texts = [TEXTS[place % len(TEXTS)] for place in places if place not in drop]
        groups.append([(units_of(prompt, text, forking), reward_of(text, forking)) for text in texts])
    return formula_gradients(policy(torch.float64) if model is None else model, groups)


def first_gradients(tmp_path: Any, **options: Any) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Gradients of the first update in float64, the prompts of its batch, and what was logged."""
    model = options.pop("model", None)
    trainer = pgrpo_trainer(
        tmp_path, model=policy(torch.float64) if model is None else model, max_steps=1, log_rollouts=-1, **options
    )
    exact_head(trainer.model)
    seen: list[str] = []
    tokenize = trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda prompts: (seen.extend(prompts), tokenize(prompts))[1]
    steps, logs = train(trainer)
    return steps[0], seen[::GROUP], logs


def assert_equal(found: dict[str, Any], wanted: dict[str, Any], limit: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert scale > 1e-4
    errors = {name: float((found[name] - gradient).abs().max()) / scale for name, gradient in wanted.items()}
    assert max(errors.values()) < limit


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_tokens_per_forward": 200},
        {"forking": False},
    ],
    ids=["one micro-batch", "accumulation", "cut forwards", "sequential"],
)
def test_gradient_equals_the_formula(tmp_path, options):
    found, prompts, logs = first_gradients(tmp_path, **options)
    assert len(prompts) == 2
    assert_equal(found, expected(prompts, forking=options.get("forking", True)))
    assert logs[0]["accuracy"] == 0.75
    assert logs[0]["clip_ratio/region_mean"] == 0


def test_failed_rollouts_are_in_no_sum_and_no_mean(tmp_path):
    engine = scripted(failing(by_place, [1, 3, 6, 7]))
    found, prompts, logs = first_gradients(tmp_path, engine=engine, rollout_retries=0)
    assert_equal(found, expected(prompts, drop=(1, 3, 6, 7)))
    assert logs[0]["rollout/error"] == 0.5


def test_a_killed_engine_is_retried(tmp_path):
    engine = scripted(failing(by_place, [1, 6], times=3))
    found, prompts, logs = first_gradients(tmp_path, engine=engine)
    assert_equal(found, expected(prompts))
    assert (logs[0]["rollout/error"], logs[0]["rollout/retried"]) == (0, 3)


def test_each_update_of_a_batch_is_the_mean_over_its_own_tokens(tmp_path):
    """Two updates from one batch: TRL divides both by half of the batch's tokens; each half has another count."""
    texts = [TEXTS[0]] * 2 + [TEXTS[1]] * 2

    def choose(key: str) -> str:
        return texts[int(key.split(".")[1]) % GROUP] if int(key.split(".")[1]) < GROUP else "\\boxed{7}" + key[-1] * 9

    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    model = policy(torch.float64)
    trainer = pgrpo_trainer(
        tmp_path,
        model=model,
        engine=scripted(choose),
        reward_funcs=lambda completions, **_: rewards,
        per_device_train_batch_size=GROUP,
        steps_per_generation=2,
        max_steps=1,
    )
    exact_head(trainer.model)
    seen: list[str] = []
    tokenize = trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda prompts: (seen.extend(prompts), tokenize(prompts))[1]
    (found,), _ = train(trainer)
    candidates = []
    for number in range(2):
        group = [
            (units_of(seen[place], choose(f"0.{place}")), rewards[place])
            for place in range(number * GROUP, (number + 1) * GROUP)
        ]
        candidates.append(formula_gradients(policy(torch.float64), [group]))
    errors = [max(float((found[n] - c[n]).abs().max()) for n in found) for c in candidates]
    assert min(errors) < 1e-9 < max(errors)
