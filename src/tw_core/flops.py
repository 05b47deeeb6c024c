"""What a trie saves: tokens, visible pairs and FLOPs, on the trie and on the sequences one by one.

FLOPs of a decoder of the llama kind (rotary attention with grouped heads, gated MLP, or a mixture of such experts):
2 per weight and token in the linear layers, 4 * head_dim per head and visible pair in attention, 2 per weight of the
head and row that has a target. The backward costs 2x of that for weights and 2.5x for attention, which recomputes the
logits (FlashAttention-2, arXiv:2307.08691). The ratio of the two sides is the r-bound of a measured speed-up:
sharing efficiency = speed-up / `flop_ratio`.

Tests: tests/core/test_flops.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tw_core._shapes import Int64
from tw_core.errors import TrieError

if TYPE_CHECKING:
    from tw_core.trie import ReasoningTrie

LINEAR_BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5


class Work(NamedTuple):
    """What a model has to compute, before its shape is known.

    Attributes:
        histogram: How many queries see k keys, for each k. Shape (K,), int64.
        head_rows: Rows on which the head runs: those with a target.
    """

    histogram: Int64[np.ndarray, " K"]
    head_rows: int

    @property
    def tokens(self) -> int:
        """Rows that go through the layers."""
        return int(self.histogram.sum())

    def pairs(self, window: int | None = None) -> int:
        """Visible (query, key) pairs; with a window, those fewer than `window` apart along the path."""
        keys = np.arange(self.histogram.size)
        return int(self.histogram @ (keys if window is None else np.minimum(keys, window)))


class Flops(NamedTuple):
    """Floating-point operations of one pass over a trie or its sequences."""

    linear: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        """Of the forward."""
        return self.linear + self.attention + self.head

    @property
    def backward(self) -> float:
        """Of the backward, without recomputation of activations."""
        return LINEAR_BACKWARD * (self.linear + self.head) + ATTENTION_BACKWARD * self.attention

    @property
    def total(self) -> float:
        """Of a training step."""
        return self.forward + self.backward


def trie_work(trie: ReasoningTrie) -> Work:
    """The work of a trie: each row once; a row at depth d sees d + 1 rows."""
    rows = np.unique(trie.parent[trie.weights > 0]).size
    return Work(np.bincount(trie.position_ids + 1), rows)


def expanded_work(trie: ReasoningTrie) -> Work:
    """The work of the trie's sequences one by one, without padding."""
    ending = np.bincount(trie.sequence_lengths)  # sequences by length
    at_least = ending[::-1].cumsum()[::-1]  # [k]: sequences of at least k tokens = queries that see k keys
    at_least[0] = 0
    return Work(at_least, int(trie.loss_masks.sum()))


def flops(config: Any, work: Work) -> Flops:
    """FLOPs of a forward over `work`; `.backward` and `.total` follow from it.

    Args:
        config: A transformers text config, or any object with its attributes: hidden_size, num_hidden_layers,
            num_attention_heads, vocab_size, intermediate_size; where they differ from the rest num_key_value_heads,
            head_dim, sliding_window with layer_types, num_experts_per_tok with moe_intermediate_size.
        work: From `trie_work` or `expanded_work`.

    Raises:
        TrieError: An attribute is missing, or the architecture has layers that this count does not know.
    """
    if unknown := [name for name in ("q_lora_rank", "kv_lora_rank", "state_size") if getattr(config, name, None)]:
        raise TrieError(
            f"config must describe a llama-like decoder, got one with {unknown[0]}; count its FLOPs layer by layer"
        )
    layers, hidden, heads = (_size(config, n) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    projections = hidden * head_dim * (2 * heads + 2 * key_heads)  # q, o and k, v
    weights = layers * projections + sum(_mlp_weights(config, hidden, layer) for layer in range(layers))
    pairs = sum(work.pairs(window) for window in _windows(config, layers))
    return Flops(
        linear=2.0 * weights * work.tokens,
        attention=4.0 * heads * head_dim * pairs,
        head=2.0 * hidden * _size(config, "vocab_size") * work.head_rows,
    )


def flop_ratio(config: Any, trie: ReasoningTrie) -> float:
    """FLOPs of a training step on the sequences one by one over those on the trie: what sharing can gain at most."""
    return flops(config, expanded_work(trie)).total / flops(config, trie_work(trie)).total


def _size(config: Any, name: str) -> int:
    value: object = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise TrieError(f"config.{name} must be a positive integer, got {value!r}; pass the config of the text model")
    return value


def _mlp_weights(config: Any, hidden: int, layer: int) -> int:
    """Weights of a gated MLP that one token meets in this layer."""
    active: int | None = getattr(config, "num_experts_per_tok", None)
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or ()
    if not active or layer in dense or (layer + 1) % step:
        return 3 * hidden * _size(config, "intermediate_size")
    width: int = getattr(config, "moe_intermediate_size", None) or _size(config, "intermediate_size")
    experts: int = getattr(config, "num_experts", None) or _size(config, "num_local_experts")
    shared: int = getattr(config, "shared_expert_intermediate_size", None) or 0
    return hidden * (3 * (active * width + shared) + experts)  # with the router


def _windows(config: Any, layers: int) -> list[int | None]:
    """The window of each layer's attention, None where it sees everything."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise TrieError(
            f"config.layer_types must be full or sliding attention, got {unknown[0]}; count its FLOPs by hand"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]
