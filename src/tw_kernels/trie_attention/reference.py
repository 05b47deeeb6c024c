"""Eager reference of trie attention: the oracle that every implementation is tested against.

Written to be read, for any float dtype, on any device; memory grows with H x N x N. Gradients come from autograd.
Suffixes: H query heads, N rows, D head dimension of q and k, V head dimension of v.
Guarded by tests/kernels/test_reference.py, which runs the sequences of each trie one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tw_core.masks import check_forest, dense_mask
from tw_kernels.trie_attention.call import AttentionCall


def reference_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Softmax over each row's path, as defined in `call.py`.

    Computes in float32, or in float64 for float64 inputs.

    Args:
        call: The validated request.

    Returns:
        out (N, H, Dv) in the dtype of q and lse (H, N) in float32 (float64 for float64).

    Raises:
        TrieError: subtree_end is not a forest, or depth does not rise by one along it.
    """
    check_forest(call.subtree_end, call.depth)
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    with torch.autocast(call.q.device.type, enabled=False):
        q_NHD = call.q.to(dtype)
        k_NHD = call.k.to(dtype).repeat_interleave(call.group, dim=1)
        v_NHV = call.v.to(dtype).repeat_interleave(call.group, dim=1)

        logits_HNN = torch.einsum("nhd,mhd->hnm", q_NHD, k_NHD) * call.scale
        if call.softcap is not None:
            logits_HNN = call.softcap * torch.tanh(logits_HNN / call.softcap)
        logits_HNN = logits_HNN.masked_fill(~visible_pairs(call), float("-inf"))

        lse_HN = torch.logsumexp(logits_HNN, dim=-1)
        if call.sinks is not None:
            lse_HN = torch.logaddexp(lse_HN, call.sinks.to(dtype)[:, None])
        p_HNN = torch.exp(logits_HNN - lse_HN[:, :, None])
        out_NHV = torch.einsum("hnm,mhv->nhv", p_HNN, v_NHV)
    return out_NHV.to(call.q.dtype), lse_HN


def visible_pairs(call: AttentionCall) -> Tensor:
    """(N, N) bool: query (first axis) meets key (second axis), the window included."""
    mask_NN = dense_mask(call.subtree_end)
    if call.window is not None:
        assert call.depth is not None
        mask_NN = mask_NN & (call.depth[:, None] - call.depth[None, :] < call.window)
    return mask_NN
