"""Counts of tokens, pairs and FLOPs against sequences walked one by one, and against torch's own FLOP counter."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.support.models import tiny_model
from tests.support.sequences import grow, masked_sets
from tw_core import ReasoningTrie, TrieError
from tw_core.flops import Work, expanded_work, flop_ratio, flops, trie_work

SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 16, "vocab_size": 32}


def config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**SMALL, **changes})


@given(masked_sets(), st.none() | st.integers(1, 6))
def test_work_is_what_walking_the_sequences_counts(
    case: tuple[list[list[int]], list[list[bool]]], window: int | None
) -> None:
    sequences, masks = case
    trie = ReasoningTrie.from_sequences(sequences, masks)
    shared, single = trie_work(trie), expanded_work(trie)
    reach = window or 10**6
    assert shared.tokens == trie.num_tokens
    assert single.tokens == trie.num_expanded_tokens
    assert shared.pairs(window) == sum(min(len(prefix), reach) for prefix in grow(sequences).prefixes)
    assert single.pairs(window) == sum(min(at + 1, reach) for s in sequences for at in range(len(s)))
    assert single.head_rows == sum(sum(mask[1:]) for mask in masks)
    assert shared.head_rows == len(
        {tuple(s[:at]) for s, m in zip(*case, strict=True) for at in range(1, len(s)) if m[at]}
    )


def test_a_chain_gains_nothing_and_a_star_at_most_its_branches() -> None:
    chain = ReasoningTrie.from_sequences([np.arange(50)])
    assert flop_ratio(config(), chain) == 1
    star = ReasoningTrie.from_sequences([[*range(500), 1000 + i] for i in range(8)], [[0] * 500 + [1]] * 8)
    assert 7 < flop_ratio(config(), star) < 8


@pytest.mark.parametrize(
    ("family", "options"), [("qwen3", {}), ("llama", {"num_key_value_heads": 4}), ("qwen3", {"num_key_value_heads": 1})]
)
def test_forward_and_backward_equal_torchs_count_of_a_real_model(family: str, options: dict[str, Any]) -> None:
    """Torch counts the dense square of attention and no recomputation; the rest must agree exactly."""
    model, n = tiny_model(family, attn_implementation="eager", **options).train(), 24
    work = trie_work(ReasoningTrie.from_sequences([np.arange(n)]))
    count = flops(model.config, Work(work.histogram, n))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(n)[None], use_cache=False).logits
    forward = counter.get_total_flops()
    with counter:
        logits.sum().backward()
    backward = counter.get_total_flops()  # the counter starts anew with every `with`
    attention = count.attention * n * n / work.pairs()
    assert forward == count.linear + count.head + attention
    assert backward == 2 * (count.linear + count.head + attention)


def test_mixtures_count_the_experts_that_a_token_meets() -> None:
    dense = flops(config(intermediate_size=2 * 5), Work(np.array([0, 1]), 0))
    mixed = flops(config(num_experts_per_tok=2, num_experts=4, moe_intermediate_size=5), Work(np.array([0, 1]), 0))
    assert mixed.linear - dense.linear == 2 * 3 * 8 * 4  # the routers


def test_windows_count_by_layer() -> None:
    work = Work(np.array([0, 1, 1, 1, 1]), 0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    count = flops(config(sliding_window=2, layer_types=kinds), work)
    assert count.attention == 4 * 4 * 2 * (7 + 10 + 7)
    assert flops(config(sliding_window=2), work).attention == 4 * 4 * 2 * 21
    assert flops(config(sliding_window=2, layer_types=["full_attention"] * 3), work).attention == 4 * 4 * 2 * 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": None},
            r"config\.hidden_size must be a positive integer, got None; pass the config",
        ),
        ({"kv_lora_rank": 4}, r"config must describe a llama-like decoder, got one with kv_lora_rank; count its FLOPs"),
        ({"layer_types": ["conv"] * 3}, r"config\.layer_types must be full or sliding attention, got conv"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrieError, match=message):
        flops(config(**changes), Work(np.array([0, 1]), 0))
