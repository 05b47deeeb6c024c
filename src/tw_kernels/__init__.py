"""Attention over packed tries: forward and backward, several implementations, one meaning."""

from tw_kernels.trie_attention.api import AttentionOutput, ImplChoice, available_impls, choose_impl, trie_attention
from tw_kernels.trie_attention.call import AttentionCall

__all__ = [
    "AttentionCall",
    "AttentionOutput",
    "ImplChoice",
    "available_impls",
    "choose_impl",
    "trie_attention",
]
