"""The trainer of the last stage: P-GRPO, or GRPO without forks, from the run's settings; rollouts on a GPU.

    CPU   LockstepEngine on the model that is trained; one micro-batch a step
    GPU   trained model, float32 under autocast ──► copy, bfloat16, `FollowingEngine`; a micro-batch for each prompt

Tests: tests/recipes/pipelines/test_reproduce_reinforcement.py, test_reproduce.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tw_recipes import _compat
from tw_recipes.decoding.engine import Completion, Request
from tw_recipes.decoding.limits import Limits
from tw_recipes.decoding.lockstep_engine import LockstepEngine
from tw_recipes.grpo.pgrpo_config import PGRPOConfig
from tw_recipes.grpo.pgrpo_trainer import PGRPOTrainer
from tw_recipes.pipelines.reproduce.settings import Settings

RL_CURVE = {
    "reward": "reward",
    "accuracy": "accuracy",
    "token_latency": "rollout/token_latency",
    "total_tokens": "rollout/total_tokens",
    "activation_ratio": "rollout/activation_ratio",
    "acceleration": "rollout/acceleration",
    "format_correctness": "rollout/format_correctness",
}


class FollowingEngine(LockstepEngine):
    """A `LockstepEngine` on a copy whose weights follow another model, read before every wave.

    The copy's parameters stay where they are, so that CUDA graphs made of it stay valid. Log-probs of the sampler are
    those of the copy: where it has another number format they differ from the trainer's by what that rounds.

    Args:
        copy: A model of the same architecture; it is changed.
        source: The model to follow.
        eos_ids: Ids that end a sequence.

    Raises:
        ValueError: The models have different parameters.
    """

    def __init__(self, copy: Any, source: Any, *, eos_ids: list[int]) -> None:
        super().__init__(copy, eos_ids=eos_ids)
        wanted, given = (
            {name: tuple(p.shape) for name, p in model.named_parameters()} for model in (source, self.model)
        )
        if wanted != given:
            name = next(iter({*wanted.items()} ^ {*given.items()}))[0]
            raise ValueError(
                f"copy must have the parameters of source, {name} is {wanted.get(name)} there and {given.get(name)} in "
                "copy; load both from one checkpoint"
            )
        self.source = source

    async def _complete(self, requests: list[Request]) -> list[Completion]:
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), self.source.parameters(), strict=True):
                mine.copy_(theirs)
        return await super()._complete(requests)


def grpo_trainer(
    settings: Settings,
    model: Any,
    problems: Sequence[Mapping[str, str]],
    folder: Path,
    *,
    forking: bool,
    tokenizer: Any,
    grader: Any,
    limits: Limits,
    copied: Any = None,
) -> PGRPOTrainer:
    """A trainer for `settings.reinforcement`.

    Args:
        settings: Of the run.
        model: The model to train.
        problems: Rows {"prompt", "answer"}, in the order of their use.
        folder: The trainer's.
        forking: P-GRPO with the bonus for acceleration; False: GRPO without forks.
        tokenizer: Of the task.
        grader: Of the task.
        limits: Budgets of a response.
        copied: A copy of the model that decodes in its place.
    """
    options, on_cpu = settings.reinforcement, settings.device == "cpu"
    micro_batches = micro_batches_of(settings)
    args = PGRPOConfig(
        output_dir=str(folder),
        forking=forking,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=min(2, options.steps - 1),
        per_device_train_batch_size=options.prompts * options.generations // micro_batches,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches,
        num_generations=options.generations,
        max_completion_length=limits.max_total_tokens,
        max_thread_tokens=limits.max_thread_tokens,
        max_depth=max(limits.max_depth, 1),
        incorrect_reward=options.incorrect,
        acceleration_rho=options.rho,
        acceleration_max=options.eta_max,
        scale_rewards="group" if options.std_normalisation and forking else "none",
        rollout_engine="lockstep",
        attention_impl="varlen" if on_cpu else "auto",
        max_tokens_per_forward=8_192 if on_cpu else 65_536,
        beta=0.0,
        temperature=1.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        logging_steps=1,
        save_strategy="no",
        save_total_limit=1,
        disable_tqdm=True,
        report_to=[],
        shuffle_dataset=False,
        **_compat.no_checkpointing(),
    )
    data = Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in problems])
    engine = None if copied is None else FollowingEngine(copied, model, eos_ids=[tokenizer.eos_token_id])
    return PGRPOTrainer(model, args, data, processing_class=tokenizer, grader=grader, engine=engine)


def micro_batches_of(settings: Settings) -> int:
    """Parts of a step's batch. One keeps the activations of all its responses: on a GPU those of one prompt."""
    return 1 if settings.device == "cpu" else settings.reinforcement.prompts
