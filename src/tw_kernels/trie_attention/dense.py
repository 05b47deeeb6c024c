"""Trie attention through torch's scaled_dot_product_attention with the whole (N, N) mask.

For short rows and for devices without a block-sparse kernel. The mask costs N^2 bytes (four times that where SDPA wants
a float mask). Softcap and sinks stand outside SDPA and are refused. Guarded by tests/kernels/test_impls.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tw_kernels.trie_attention.call import AttentionCall
from tw_kernels.trie_attention.memo import once_per_tensor
from tw_kernels.trie_attention.reference import visible_pairs


def why_unsupported(call: AttentionCall) -> str | None:
    """What keeps this request from SDPA, or None."""
    if call.softcap is not None:
        return "softcap must be None (SDPA has no logit cap)"
    if call.sinks is not None:
        return "sinks must be None (SDPA has no sinks)"
    return None


def dense_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """SDPA over all pairs; lse (H, N) only when asked for, by a second pass over the logits, one head at a time."""
    mask = _mask(call)
    # (N, H, D) -> (1, H, N, D)
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    # SDPA's memory-efficient backward on CUDA adds with atomics; its plain one does not.
    backends = [SDPBackend.MATH] if call.deterministic and q.is_cuda else list(SDPA_BACKENDS)
    with torch.autocast(q.device.type, enabled=False), sdpa_kernel(backends):
        grouped = {"enable_gqa": True} if call.group > 1 else {}  # a branch: torch.compile has no bool otherwise
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale, **grouped)
    return out[0].transpose(0, 1), _lse(call, mask) if call.with_lse else None


SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def _mask(call: AttentionCall) -> Tensor:
    """(N, N) bool, made once per packed row and window."""
    return once_per_tensor(call.subtree_end, ("dense mask", call.window), lambda _: visible_pairs(call))


@torch.no_grad()
def _lse(call: AttentionCall, mask: Tensor) -> Tensor:
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    with torch.autocast(call.q.device.type, enabled=False):
        rows = []
        for head in range(call.q.shape[1]):
            logits = call.q[:, head].to(dtype) @ call.k[:, head // call.group].to(dtype).T * call.scale  # (N, N)
            rows.append(logits.masked_fill_(~mask, float("-inf")).logsumexp(dim=-1))
        return torch.stack(rows)
