"""The same training run twice: TRL's SFTTrainer on expanded units, and ours on tries. Plus a byte-level tokenizer."""

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.support.tries import random_units
from tw_recipes import TrieSFTConfig, TrieSFTTrainer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BYTE_VOCAB = 262


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, pad 256, eos 257, two roles; 260 tokens, without the tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def trajectories(count: int, units: int, seed: int = 0) -> list[list[list[list[int]]]]:
    """`count` samples of `units` units with uneven lengths."""
    rng = random.Random(seed)
    return [random_units(rng, units, longest=rng.choice([4, 12])) for _ in range(count)]


def expanded_dataset(samples: list[list[list[list[int]]]]) -> Dataset:
    """One row a unit, loss on completions only, in the order of the samples."""
    rows = [unit for sample in samples for unit in sample]
    return Dataset.from_dict(
        {
            "input_ids": [context + completion for context, completion in rows],
            "labels": [[-100] * len(context) + completion for context, completion in rows],
        }
    )


def common_options(output_dir: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 10,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "weight_decay": 0.0,
        **options,
    }


def stock_trainer(model: Any, samples: list, output_dir: Any, *, peft_config: Any = None, **options: Any) -> SFTTrainer:
    """TRL on expanded units; a micro-batch holds the units of as many samples as a micro-batch of ours."""
    batch = options.pop("per_device_train_batch_size", 1) * len(samples[0])
    args = SFTConfig(
        **common_options(output_dir, options),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    dataset, tokenizer = expanded_dataset(samples), byte_tokenizer()
    tokenizer.pad_token = "!"  # a byte, within the vocabulary of the tiny models
    return SFTTrainer(
        model, args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )


def trie_trainer(
    model: Any, samples: list, output_dir: Any, *, peft_config: Any = None, **options: Any
) -> TrieSFTTrainer:
    """Ours on the same samples, one trie a row."""
    args = TrieSFTConfig(**{"pack_samples": False, **common_options(output_dir, options)})
    dataset = Dataset.from_dict({"units": samples})
    return TrieSFTTrainer(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logged(trainer: Any, name: str) -> list[float]:
    """A metric step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
