"""Train, run, reward, generate data for, measure and show fork/join reasoning.

Names load on first use (PEP 562), so that `import tw_recipes` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "ForkJoinDecoder": "tw_recipes.decoding.decoder",
    "LockstepEngine": "tw_recipes.decoding.lockstep_engine",
    "OpenAIEngine": "tw_recipes.decoding.openai_engine",
    "PGRPOConfig": "tw_recipes.grpo.pgrpo_config",
    "PGRPOTrainer": "tw_recipes.grpo.pgrpo_trainer",
    "ScriptedEngine": "tw_recipes.decoding.scripted_engine",
    "TransformersEngine": "tw_recipes.decoding.transformers_engine",
    "TrieCollator": "tw_recipes.sft.collator",
    "TrieGRPOConfig": "tw_recipes.grpo.config",
    "TrieGRPOTrainer": "tw_recipes.grpo.trainer",
    "TrieSFTConfig": "tw_recipes.sft.config",
    "TrieSFTTrainer": "tw_recipes.sft.trainer",
    "UnsupportedModelError": "tw_recipes.support",
    "VLLMEngine": "tw_recipes.decoding.vllm_engine",
    "add_tag_tokens": "tw_recipes.tokens",
    "generate_data": "tw_recipes.datagen.generate",
    "install": "tw_recipes.attention",
    "native_attention": "tw_recipes.attention",
    "prepare_dataset": "tw_recipes.sft.data",
    "self_train_select": "tw_recipes.datagen.self_training",
    "uninstall": "tw_recipes.attention",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
