"""The Qwen3 that the tasks train from scratch: by default 170k parameters, float32, minutes on two CPU cores."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_model(
    tokenizer: Any,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 3,
    heads: int = 4,
    context: int = 2048,
    init: float = 0.08,
) -> Qwen3ForCausalLM:
    """A random model for a task's tokenizer.

    Args:
        tokenizer: Gives the vocabulary and the end-of-sequence and padding ids.
        seed: Of the weights. The global random state is left as it was.
        hidden_size: A multiple of `heads`; the feed-forward layers are three times as wide.
        layers: Decoder layers.
        heads: Attention heads, each with its own keys.
        context: Longest sequence.
        init: Standard deviation of the random weights; with 0.02 so small a model learns several times slower.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=init,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
