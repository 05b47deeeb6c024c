"""TRL's AsyncGRPOTrainer with trie attention in its tree path, instead of a FlashAttention 3 kernel from the Hub.

AsyncGRPOTrainer packs rollouts into tries itself and hands every layer the runs of rows without a fork (`tree_*`); its
own attention gathers keys and values along each run's path, in every layer, and needs FlashAttention 3. Here the same
arguments become one `subtree_end`, so nothing is gathered, and any GPU will do.

    VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-0.6B --logprobs-mode processed_logprobs \\
        --weight-transfer-config '{"backend": "nccl"}'
    accelerate launch examples/grpo/async_tree_attention.py

Test: tests/recipes/grpo/test_async_example.py.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from tw_kernels import trie_attention

TREE_ATTENTION = "tree_fa3"  # the name under which AsyncGRPOTrainer builds its model


def tree_rows(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """subtree_end and depth of a packed trie, from where its S segments and their paths start.

    Args:
        cu_seqlens_q: First row of each segment, then N. Shape (S + 1,), int32.
        cu_seqlens_k: The same of each segment's path from the root, itself included. Shape (S + 1,), int32.
        num_rows: N.

    Returns:
        (N,) int32 each.
    """
    lengths = cu_seqlens_q.diff()
    above = cu_seqlens_k.diff() - lengths  # (S,) depth of each segment's first row
    segment = torch.arange(len(lengths), device=lengths.device)
    # A subtree ends where the next segment that starts no deeper begins.
    follows = (segment[None, :] > segment[:, None]) & (above[None, :] <= above[:, None])
    next_segment = torch.where(follows.any(1), follows.int().argmax(1), len(lengths))
    offsets = above - cu_seqlens_q[:-1]
    rows = torch.arange(num_rows, dtype=torch.int32, device=lengths.device)
    end, shift = torch.stack([cu_seqlens_q[next_segment], offsets]).repeat_interleave(
        lengths, dim=1, output_size=num_rows
    )
    return end.contiguous(), rows + shift


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    impl: str,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: q (1, H, N, D), k and v (1, Hkv, N, D) -> (1, N, H, D)."""
    if not hasattr(tree_cu_seqlens_q, "rows"):  # once a forward: every layer gets the same tensors, and plans once
        tree_cu_seqlens_q.rows = tree_rows(tree_cu_seqlens_q, tree_cu_seqlens_k, query.shape[2])
    subtree_end, depth = tree_cu_seqlens_q.rows
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = trie_attention(
        q, k, v, subtree_end, position_ids=depth, scale=scaling, window=sliding_window, softcap=softcap, impl=impl
    )
    return out[None], None


class TrieAsyncGRPOTrainer(AsyncGRPOTrainer):
    """AsyncGRPOTrainer whose tree path runs `tw_kernels.trie_attention`; all arguments are TRL's."""

    def __init__(self, *args: Any, attention_impl: str = "auto", **kwargs: Any):
        super().__init__(*args, **kwargs)
        # TRL registers its own function while it builds the model, so ours comes after.
        AttentionInterface.register(TREE_ATTENTION, functools.partial(attend, impl=attention_impl))


def main() -> None:
    """Qwen3-0.6B on DeepMath, against a vLLM server on this machine."""
    from datasets import load_dataset
    from trl.rewards import accuracy_reward

    TrieAsyncGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=AsyncGRPOConfig(output_dir="out/async-grpo", max_steps=100, num_generations=8, bf16=True),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ).train()


if __name__ == "__main__":
    main()
