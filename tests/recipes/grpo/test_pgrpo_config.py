"""PGRPOConfig: its defaults are the paper's, and what cannot work is refused with the next step."""

import pytest

from tests.support.grpo import grpo_options
from tw_recipes.grpo.pgrpo_config import PGRPOConfig


def config(tmp_path, **options) -> PGRPOConfig:
    return PGRPOConfig(**grpo_options(tmp_path, **options))


def test_defaults(tmp_path):
    args = config(tmp_path)
    assert (args.scale_rewards, args.loss_type, args.beta) == ("none", "dapo", 0.0)
    assert (args.epsilon, args.epsilon_high, args.acceleration_rho, args.acceleration_max) == (0.2, 0.28, 0.5, 0.2)
    assert (args.staleness, args.limits.max_total_tokens, args.limits.max_thread_tokens) == (0, 12, 12)
    assert args.limits.forks
    assert not config(tmp_path, forking=False).limits.forks


@pytest.mark.parametrize(
    ("options", "staleness"),
    [
        ({"gradient_accumulation_steps": 4}, 0),
        ({"gradient_accumulation_steps": 4, "num_iterations": 2}, 1),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 8}, 3),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 0),
    ],
)
def test_staleness_follows_from_the_options_and_is_bounded(tmp_path, options, staleness):
    assert config(tmp_path, **options, max_staleness=staleness).staleness == staleness
    if staleness:
        with pytest.raises(ValueError, match=f"up to {staleness} optimizer steps after.*max_staleness={staleness - 1}"):
            config(tmp_path, **options, max_staleness=staleness - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_engine": "sglang"}, "rollout_engine must be one of auto, lockstep, transformers, vllm"),
        ({"rollout_engine": "vllm"}, "rollout_engine=.vllm. and use_vllm=True go together, got 'vllm' and False"),
        ({"rollout_engine": "lockstep", "use_vllm": True}, "go together, got 'lockstep' and True"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size must be 1 in colocate mode"),
        ({"loss_type": "dr_grpo", "dynamic_sampling": True}, "dr_grpo divides by a constant"),
        ({"max_failed_share": 1.5}, r"max_failed_share must be in \[0, 1\], got 1.5"),
        ({"rollout_retries": -1}, "rollout_retries and retry_wait_s must be >= 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"repetition_penalty": 1.1}, "not known to the engines"),
        ({"min_p": 0.1}, "not known to the engines"),
        ({"max_threads": 0}, "max_threads must be >= 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
