"""The same GRPO run twice: TRL's GRPOTrainer, and ours on tries; tiny models on disk, byte tokenizer, fixed rewards."""

from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.support.models import tiny_model
from tests.support.sft import BYTE_VOCAB, byte_tokenizer
from tw_recipes.grpo.config import TrieGRPOConfig
from tw_recipes.grpo.trainer import TrieGRPOTrainer

PROMPTS = ["What is 2+2?", "Name a colour, please:", "x", "Count to ten, slowly and aloud: one, two,"]
GROUP = 4  # num_generations


@cache
def saved_model(family: str = "qwen3", **options: Any) -> str:
    """Folder of a tiny random model with the byte tokenizer's vocabulary."""
    folder = mkdtemp(prefix=f"tiny-{family}-")
    tiny_model(family, vocab_size=BYTE_VOCAB, **options).save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, padding on the left."""
    made = byte_tokenizer()
    made.padding_side = "left"
    return made


def token_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number in [0, 1) that depends on every token of the completion."""
    return [(sum(ids) % 17) / 17 for ids in completion_ids]


class GradientRecorder(TrainerCallback):
    """The gradients of every optimizer step, before clipping moves the parameters."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def grpo_options(output_dir: Path | str, **options: Any) -> dict[str, Any]:
    """What both trainers are given: SGD, so that rounding is not amplified from step to step."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e6,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 12,
        **options,
    }


def make_trainer(
    kind: str,
    output_dir: Path | str,
    *,
    family: str = "qwen3",
    model: Any = None,
    prompts: list[str] | None = None,
    reward_funcs: Any = token_reward,
    rollout_func: Any = None,
    peft_config: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> GRPOTrainer:
    """A trainer of `kind` "stock" or "trie" with the same data, seed and options."""
    trainer_class, config_class = {
        "stock": (GRPOTrainer, GRPOConfig),
        "trie": (TrieGRPOTrainer, TrieGRPOConfig),
    }[kind]
    return trainer_class(
        model if model is not None else saved_model(family),
        reward_funcs,
        config_class(**grpo_options(output_dir, **options)),
        train_dataset=Dataset.from_dict({"prompt": prompts or PROMPTS}),
        processing_class=tokenizer(),
        rollout_func=rollout_func,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def train(trainer: GRPOTrainer) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Run it; gradients and logged metrics of each optimizer step."""
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    torch.manual_seed(0)
    trainer.train()
    return recorder.steps, [entry for entry in trainer.state.log_history if "loss" in entry]


def branching_rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
    """A `rollout_func` without an engine: random trees whose rows begin alike within a group; some glue is masked.

    What a prompt gets depends on the prompt and the place in its group alone, on whichever rank it is.
    """
    first = trainer.accelerator.process_index * len(prompts)
    output: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "completion_parents": [], "env_mask": []}
    for row, prompt in enumerate(prompts, start=first):
        shared, own = Random(prompt), Random(f"{prompt} {row % GROUP}")
        ids = [shared.randrange(3, 90) for _ in range(5)]
        parents, mask = list(range(-1, 4)), [1] * 5
        for thread in range(own.randint(1, 3)):
            size = own.randint(2, 6)
            parents += [own.randint(-1, len(ids) - 1), *range(len(ids), len(ids) + size - 1)]
            ids += [own.randrange(3, 90) for _ in range(size)]
            mask += [int(thread == 0)] + [1] * (size - 1)
        output["prompt_ids"].append(trainer.processing_class(prompt)["input_ids"])
        output["completion_ids"].append(ids)
        output["completion_parents"].append(parents)
        output["env_mask"].append(mask)
    return output | {"logprobs": None}


def chain_rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
    """A `rollout_func` without an engine: completions of uneven lengths, by prompt and place in the group."""
    first = trainer.accelerator.process_index * len(prompts)
    lengths = [Random(f"{prompt} {row % GROUP}") for row, prompt in enumerate(prompts, start=first)]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[own.randrange(3, 90) for _ in range(own.randint(2, 12))] for own in lengths],
        "logprobs": None,
    }
