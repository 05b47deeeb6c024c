"""Attention over packed tries: forward and backward, several implementations, one meaning."""

from tw_kernels.trie_attention.api import AttentionOutput, ImplChoice, available_impls, choose_impl, trie_attention
from tw_kernels.trie_attention.call import AttentionCall
from tw_kernels.trie_attention.plan import BlockPlan, make_plan

__all__ = [
    "AttentionCall",
    "AttentionOutput",
    "BlockPlan",
    "ImplChoice",
    "available_impls",
    "choose_impl",
    "make_plan",
    "trie_attention",
]
