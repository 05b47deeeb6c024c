"""The Qwen3 that the tasks train from scratch: by default 170k parameters, float32, minutes on two CPU cores."""

import math
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
    composed: bool = False,
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
        composed: Start the embeddings of a label (7aR), input and output, as sums of one vector a character and its
            place. What is learned of one label then holds for others; else each pair of labels that a solution looks up
            is learned by itself, and the rare ones late or never.
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
        model = Qwen3ForCausalLM(config)
        if composed:
            for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
                _compose_labels(weight.data, tokenizer.get_vocab(), init)
        return model


def _compose_labels(weight: torch.Tensor, vocab: dict[str, int], init: float) -> None:
    """Replace the rows of all labels in `weight` (V, D); their entries keep the standard deviation `init`.

    Labels are the tokens of several letters and digits.
    """
    parts: dict[tuple[int, str], torch.Tensor] = {}
    for label, row in sorted(vocab.items()):
        if len(label) > 1 and label.isalnum():
            chosen = list(enumerate(label))
            for part in chosen:
                if part not in parts:
                    parts[part] = torch.randn(weight.shape[1])
            weight[row] = sum(parts[part] for part in chosen) * (init / math.sqrt(len(chosen)))
