"""The public surface: exactly these names, sorted, and all of them there."""

from importlib import import_module

import pytest

PUBLIC = {
    "tw_core": [
        "TAGS",
        "Block",
        "BudgetError",
        "Conclusion",
        "Element",
        "FormatReport",
        "GrammarError",
        "Outline",
        "Outlines",
        "PackedTrie",
        "ParallelStats",
        "Problem",
        "ReasoningTrie",
        "ShapeError",
        "TagIds",
        "Thread",
        "ThreadWeaverError",
        "Trajectory",
        "TrieError",
        "Unit",
        "check_format",
        "check_ids",
        "encode_units",
        "extract_units",
        "fork_numbers",
        "pack_forest",
        "parallel_stats",
        "parse",
        "render",
    ],
    "tw_kernels": [
        "AttentionCall",
        "AttentionOutput",
        "BlockPlan",
        "ImplChoice",
        "available_impls",
        "choose_impl",
        "make_plan",
        "trie_attention",
    ],
    "tw_recipes": [
        "ForkJoinDecoder",
        "LockstepEngine",
        "OpenAIEngine",
        "PGRPOConfig",
        "PGRPOTrainer",
        "ScriptedEngine",
        "TransformersEngine",
        "TrieCollator",
        "TrieGRPOConfig",
        "TrieGRPOTrainer",
        "TrieSFTConfig",
        "TrieSFTTrainer",
        "UnsupportedModelError",
        "VLLMEngine",
        "add_tag_tokens",
        "generate_data",
        "install",
        "native_attention",
        "prepare_dataset",
        "self_train_select",
        "uninstall",
    ],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_pinned(package: str) -> None:
    module = import_module(package)
    assert module.__all__ == PUBLIC[package]
    assert all(hasattr(module, name) for name in module.__all__)
    assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_names_that_users_rely_on_are_public() -> None:
    """The fixed names of the design; each package's list above may only grow around them."""
    fixed = {"ReasoningTrie", "PackedTrie", "Unit", "Trajectory", "TagIds", "parse", "render", "check_format"}
    fixed |= {"extract_units", "parallel_stats", "pack_forest"}
    assert fixed <= set(PUBLIC["tw_core"])
    assert {"trie_attention", "available_impls"} <= set(PUBLIC["tw_kernels"])
    trainers = {f"{name}{part}" for name in ("TrieSFT", "TrieGRPO", "PGRPO") for part in ("Trainer", "Config")}
    engines = {"TransformersEngine", "OpenAIEngine", "ScriptedEngine"}
    assert trainers | engines | {"install", "TrieCollator", "ForkJoinDecoder"} <= set(PUBLIC["tw_recipes"])
