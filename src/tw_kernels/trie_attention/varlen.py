"""Trie attention segment by segment through variable-length flash attention.

A segment is a maximal chain of only children; its rows stand together in preorder, so the packed queries are already
the varlen batch. Keys and values are gathered along each segment's path from the root; in a segment attention is
causal from the bottom right, with a window in depth likewise. The gather is what this way pays: a shared prefix is
copied once for each segment under it.

On a GPU: flash-attn when it is installed, else torch.nn.attention.varlen. On a CPU, where neither exists, the segments
run through scaled_dot_product_attention, those of one shape together: right, and a loop over shapes.
Guarded by tests/kernels/test_varlen.py (segments) and test_impls.py.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tw_kernels.trie_attention.call import AttentionCall
from tw_kernels.trie_attention.memo import once_per_tensor

# SDPA on a CPU computes masked pairs too: a chain in pieces of so many queries leaves most of the future out.
_CPU_QUERIES = 128
FLASH_ATTN_INSTALLED = importlib.util.find_spec("flash_attn") is not None


class Segments(NamedTuple):
    """The varlen batch of a packed trie: S segments, K gathered key rows.

    `key_rows` is None when every segment is a whole tree: the keys are then the rows themselves.
    """

    cu_queries: Tensor  # (S + 1,) int32, first row of each segment, then N
    cu_keys: Tensor  # (S + 1,) int32, where each segment's keys start among the gathered ones
    key_rows: Tensor | None  # (K,) int64, the rows to gather
    max_queries: int
    max_keys: int


def make_segments(subtree_end: Tensor, window: int | None = None, longest: int | None = None) -> Segments:
    """Cut a packed trie into segments and list the key rows of each one's path.

    With a window, rows that no query of the segment can see are left out at the path's start. Reads `subtree_end` on
    the host, so it synchronises; work and memory grow with K.

    Args:
        subtree_end: Shape (N,), int32, N >= 1.
        window: As in `trie_attention`.
        longest: Rows of a segment at most; a longer chain becomes several, each under the one before.
    """
    end = subtree_end.cpu().numpy().astype(np.int64)
    n = len(end)
    # A row continues its segment exactly when it is the only child of the row before: their subtrees end together.
    starts = np.concatenate([[True], end[1:] != end[:-1]])  # (N,)
    if longest is not None:
        row = np.arange(n)
        starts |= (row - np.maximum.accumulate(np.where(starts, row, 0))) % longest == 0
    first = np.flatnonzero(starts)  # (S,)
    last = np.append(first[1:], n)  # (S,) one past the segment's last row
    lengths = last - first
    parent = _parents(first, end[first])
    # (segment, ancestor) pairs, climbing all segments at once; a segment is its own last ancestor.
    pair_segment = [np.arange(len(first))]
    pair_ancestor = [np.arange(len(first))]
    while len(pair_segment[-1]):
        above = parent[pair_ancestor[-1]]
        pair_segment.append(pair_segment[-1][above >= 0])
        pair_ancestor.append(above[above >= 0])
    segment = np.concatenate(pair_segment)
    ancestor = np.concatenate(pair_ancestor)
    order = np.lexsort((ancestor, segment))
    segment, ancestor = segment[order], ancestor[order]
    start, stop = first[ancestor], last[ancestor]
    if window is not None:
        # The segment's first query stands `back` rows after the ancestor's row `stop - 1`, counted along the path.
        path_stop = np.cumsum(stop - start)
        own = np.searchsorted(segment, np.arange(len(first)), side="right") - 1  # the pair of each segment with itself
        back = path_stop[own][segment] - lengths[segment] - path_stop
        start = np.minimum(stop, np.maximum(start, stop - np.maximum(window - 1 - back, 0)))
        start = np.where(ancestor == segment, first[segment], start)
    counts = stop - start
    keys = np.bincount(segment, weights=counts, minlength=len(first)).astype(np.int64)
    key_rows = None
    if not np.array_equal(keys, lengths):
        offsets = np.cumsum(counts) - counts
        key_rows = np.repeat(start - offsets, counts) + np.arange(counts.sum())

    def on_device(x: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(x).to(device=subtree_end.device, dtype=dtype)

    return Segments(
        cu_queries=on_device(np.append(first, n), torch.int32),
        cu_keys=on_device(np.concatenate([[0], np.cumsum(keys)]), torch.int32),
        key_rows=None if key_rows is None else on_device(key_rows, torch.int64),
        max_queries=int(lengths.max()),
        max_keys=int(keys.max()),
    )


def _parents(first: np.ndarray[Any, Any], end: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Index of each segment's parent segment, -1 for a root: the last earlier one that stands one level higher."""
    index = np.arange(len(first))
    level = index - np.searchsorted(np.sort(end), first, side="right")
    key = level * len(first) + index
    order = np.sort(key)
    found = order[np.searchsorted(order, key - len(first), side="right") - 1] % len(first)
    return np.where(level > 0, found, -1)


class _GatherRows(torch.autograd.Function):
    """x[rows], whose backward adds in float32: a prefix row receives a gradient from every segment below it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, deterministic: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows, ctx.deterministic = x.shape[0], deterministic
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (rows,) = ctx.saved_tensors
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = grad.new_zeros((ctx.num_rows, *grad.shape[1:]), dtype=dtype)
        if ctx.deterministic:
            total.index_put_((rows,), grad.to(dtype), accumulate=True)  # sorts; index_add_ on CUDA uses atomics
        else:
            total.index_add_(0, rows, grad.to(dtype))
        return total.to(grad.dtype), None, None


def pays_on_cpu(call: AttentionCall) -> bool:
    """Whether the rows are many and their segments long, so that a loop over segments beats SDPA over all pairs."""
    if torch.compiler.is_compiling() or call.num_rows < 1024 or call.q.device.type != "cpu":
        return False
    end = call.subtree_end
    segments = once_per_tensor(end, "segment count", lambda alias: 1 + int((alias[1:] != alias[:-1]).sum()))
    return call.num_rows >= 32 * segments


def why_unavailable() -> str | None:
    """None: flash-attn or torch's varlen attention on a GPU, SDPA elsewhere."""
    return _why_no_kernel() if torch.cuda.is_available() else None


def _why_no_kernel() -> str | None:
    if not FLASH_ATTN_INSTALLED and "window_size" not in _torch_varlen_options():
        return f"neither flash-attn nor torch.nn.attention.varlen with windows was found in torch {torch.__version__}"
    return None


def why_unsupported(call: AttentionCall) -> str | None:
    """What keeps this call from varlen attention, or None."""
    if call.sinks is not None:
        return "sinks must be None (varlen flash attention has no sinks)"
    on_gpu = call.q.device.type == "cuda"
    if on_gpu and (why_not := _why_no_kernel()):
        return why_not
    if call.softcap is not None and not (on_gpu and FLASH_ATTN_INSTALLED):
        return "softcap must be None (only flash-attn on a GPU has a logit cap)"
    if on_gpu and call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"q must be float16 or bfloat16 on a GPU, got {call.q.dtype}"
    if on_gpu and max(call.q.shape[2], call.v.shape[2]) > 256:
        return f"head dimensions must be at most 256, got D={call.q.shape[2]} and Dv={call.v.shape[2]}"
    if on_gpu and call.deterministic and not (FLASH_ATTN_INSTALLED or torch.are_deterministic_algorithms_enabled()):
        return "deterministic=True needs flash-attn or torch.use_deterministic_algorithms(True)"
    return None


def varlen_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Gather keys and values along each segment's path, then attend bottom-right causally within segments.

    Returns:
        out (N, H, Dv) and lse (H, N) float32; on a CPU lse is None unless `call.with_lse`.
    """
    longest = None if call.q.device.type == "cuda" else _CPU_QUERIES
    segments = once_per_tensor(
        call.subtree_end, ("segments", call.window), lambda alias: make_segments(alias, call.window, longest)
    )
    k, v = call.k, call.v
    if segments.key_rows is not None:
        k = _GatherRows.apply(k, segments.key_rows, call.deterministic)  # type: ignore[no-untyped-call]
        v = _GatherRows.apply(v, segments.key_rows, call.deterministic)  # type: ignore[no-untyped-call]
    with torch.autocast(call.q.device.type, enabled=False):
        if call.q.device.type != "cuda":
            return _by_shape(call, k, v, segments)
        return _flash(call, k, v, segments)


def _flash(call: AttentionCall, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """flash-attn or torch's varlen attention: one head dimension, a multiple of 8, for q, k and v."""
    value_dim = call.v.shape[2]
    width = -(-max(call.q.shape[2], value_dim) // 8) * 8
    q, k, v = (pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x for x in (call.q, k, v))
    window = (-1, 0) if call.window is None else (call.window - 1, 0)
    batch = (q, k, v, segments.cu_queries, segments.cu_keys, segments.max_queries, segments.max_keys)
    if FLASH_ATTN_INSTALLED:
        from flash_attn import flash_attn_varlen_func

        out, lse, _ = flash_attn_varlen_func(
            *batch,
            softmax_scale=call.scale,
            causal=True,
            window_size=window,
            softcap=call.softcap or 0.0,
            deterministic=call.deterministic,
            return_attn_probs=True,
        )
    else:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        # torch 2.12 wants grouped heads announced; 2.11 takes them as they are.
        grouped: dict[str, Any] = {}
        if "enable_gqa" in _torch_varlen_options():
            grouped["enable_gqa"] = call.group > 1
        aux = AuxRequest(lse=True)
        out, lse = varlen_attn(*batch, scale=call.scale, window_size=window, return_aux=aux, **grouped)
    return out[..., :value_dim], lse


def _by_shape(call: AttentionCall, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor | None]:
    """SDPA with the bottom-right causal mask, one call for all segments with as many queries and as many keys."""
    lengths = segments.cu_queries.diff().tolist(), segments.cu_keys.diff().tolist()
    # One split each: the gradient of a slice would be as large as all rows.
    q_parts, k_parts, v_parts = (torch.split(x, lengths[i]) for x, i in ((call.q, 0), (k, 1), (v, 1)))
    shapes: dict[tuple[int, int], list[int]] = {}
    for place, shape in enumerate(zip(*lengths, strict=True)):
        shapes.setdefault(shape, []).append(place)
    outs: dict[int, Tensor] = {}
    lses: dict[int, Tensor] = {}
    for (queries, keys), places in shapes.items():
        # G x (L, H, D) -> (G, H, L, D)
        q_s, k_s, v_s = (torch.stack([x[i] for i in places]).transpose(1, 2) for x in (q_parts, k_parts, v_parts))
        behind = keys - queries  # keys before the segment's first row
        mask = None
        if behind or call.window is not None:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q_s.device).tril(behind)
            if call.window is not None:
                mask = mask.triu(behind - call.window + 1)
        out = scaled_dot_product_attention(
            q_s, k_s, v_s, attn_mask=mask, is_causal=mask is None, scale=call.scale, enable_gqa=call.group > 1
        )
        outs.update(zip(places, out.transpose(1, 2), strict=True))
        if call.with_lse:
            lses.update(zip(places, _lse_of(call, q_s, k_s, mask), strict=True))
    order = range(len(q_parts))
    return torch.cat([outs[i] for i in order]), torch.cat([lses[i] for i in order], dim=1) if lses else None


@torch.no_grad()
def _lse_of(call: AttentionCall, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(G, H, L) lse of segments of one shape, in float32 or float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = q.to(dtype) @ k.to(dtype).repeat_interleave(call.group, dim=1).mT * call.scale
    if mask is None:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).tril()
    return logits.masked_fill_(~mask, float("-inf")).logsumexp(dim=-1)


@functools.cache
def _torch_varlen_options() -> frozenset[str]:
    """Keyword names of torch's varlen_attn, which differ between torch 2.11 and 2.12; empty when it is missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
