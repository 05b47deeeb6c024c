"""Supervised fine-tuning on tries: rows -> packed forests -> `TrieCollator` -> `TrieSFTTrainer`; `threadweaver sft`."""

from importlib import import_module
from typing import Any

_HOME = {
    "DatasetStatistics": "tw_recipes.sft.data",
    "RowError": "tw_recipes.sft.rows",
    "TrieCollator": "tw_recipes.sft.collator",
    "TrieSFTConfig": "tw_recipes.sft.config",
    "TrieSFTTrainer": "tw_recipes.sft.trainer",
    "add_tag_tokens": "tw_recipes.tokens",
    "prepare_dataset": "tw_recipes.sft.data",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
