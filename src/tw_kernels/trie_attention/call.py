"""One validated request for trie attention: what every implementation receives.

Shapes: N rows of the packed trie, H query heads, Hkv key heads (H % Hkv == 0), D and Dv head dimensions.

Meaning, the same for every implementation: query i meets key j when

    j <= i < subtree_end[j]              j is i or an ancestor of i
    depth[i] - depth[j] < window         only with a window; it counts the row itself, so window=1 is the row alone

with logits scale * (q_i . k_j), then softcap * tanh(logits / softcap) when there is a softcap. The softmax runs over
the logits met and, with sinks, one more logit sinks[h] that carries no value. lse (H, N) is the natural logarithm of
that whole sum of exponentials, the sink included; no gradient flows through it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tw_core.errors import ShapeError
from tw_core.masks import check_forest, depth_from_subtree_end
from tw_kernels.trie_attention.memo import once_per_rows, once_per_tensor

if TYPE_CHECKING:
    from tw_kernels.trie_attention.plan import BlockPlan

# TW_DEBUG=1 in the environment at import makes every call check that subtree_end is a forest, at the price of a host
# synchronisation; impl="reference" always does.
DEBUG = os.environ.get("TW_DEBUG", "") not in ("", "0")

# Asked once: torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = tuple(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Validated arguments of one call; build it with `AttentionCall.build`.

    Attributes:
        q: Queries. Shape (N, H, D), stride(-1) == 1.
        k: Keys. Shape (N, Hkv, D), dtype and device of `q`, stride(-1) == 1.
        v: Values. Shape (N, Hkv, Dv), dtype and device of `q`, stride(-1) == 1.
        subtree_end: One past the last row of each row's subtree. Shape (N,), int32, contiguous.
        depth: Distance from the root. Shape (N,), int32, contiguous; None without a window.
        scale: Logit scale.
        window: Rows that a query sees along its path, itself included; None for all.
        softcap: Logit cap; None for none.
        sinks: One extra logit a head. Shape (H,), a float dtype; None for none.
        deterministic: Whether the backward must be bitwise repeatable.
        plan: `make_plan(subtree_end)`, or None to let the implementation build what it needs.
        with_lse: Whether the caller wants lse; an implementation that has it anyway may return it always.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    subtree_end: Tensor
    depth: Tensor | None
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    deterministic: bool
    plan: BlockPlan | None
    with_lse: bool

    @property
    def num_rows(self) -> int:
        """N."""
        return self.q.shape[0]

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @classmethod
    def build(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        subtree_end: Tensor,
        *,
        position_ids: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        deterministic: bool | None = None,
        plan: BlockPlan | None = None,
        with_lse: bool = False,
    ) -> AttentionCall:
        """Validate the arguments of `trie_attention` and fill in its defaults (see there)."""
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
        _check_qkv(q, k, v)
        n, num_heads, head_dim = q.shape
        subtree_end = _check_rows("subtree_end", subtree_end, n, q.device)
        depth = None
        if position_ids is not None:
            position_ids = _check_rows("position_ids", position_ids, n, q.device)
        if window is not None:
            if isinstance(window, bool) or not isinstance(window, int | torch.SymInt) or window < 1:
                raise ValueError(f"window must be an int >= 1 (1 is the row alone), got {window!r}; pass None for none")
            depth = position_ids
            if depth is None:
                depth = once_per_tensor(subtree_end, "depth", depth_from_subtree_end)
        if scale is not None and not float("-inf") < scale < float("inf"):
            raise ValueError(f"scale must be finite, got {scale!r}; pass None for 1 / sqrt(D)")
        if softcap is not None and not 0.0 < softcap < float("inf"):
            raise ValueError(f"softcap must be a positive number, got {softcap!r}; pass None for no cap")
        if sinks is not None:
            _check_sinks(sinks, num_heads, q.device)
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        call = cls(
            q=q,
            k=k,
            v=v,
            subtree_end=subtree_end,
            depth=depth,
            scale=head_dim**-0.5 if scale is None else float(scale),
            window=window,
            softcap=None if softcap is None else float(softcap),
            sinks=sinks,
            deterministic=bool(deterministic),
            plan=plan,
            with_lse=with_lse,
        )
        if DEBUG:
            check_forest(call.subtree_end, position_ids)
        return call


def _autocast(x: Tensor) -> Tensor:
    """Under autocast, cast as scaled_dot_product_attention does: floating point but float64 to autocast's dtype."""
    device = x.device.type
    if (
        not x.is_floating_point()
        or x.dtype == torch.float64
        or device not in AUTOCAST_DEVICES
        or not torch.is_autocast_enabled(device)
    ):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x, letters in (("q", q, "N, H, D"), ("k", k, "N, Hkv, D"), ("v", v, "N, Hkv, Dv")):
        if x.dim() != 3:
            got = tuple(x.shape)
            raise ShapeError(f"{name} must have shape ({letters}), got {got}; pass one packed row, without a batch")
    n, num_heads, head_dim = q.shape
    num_kv = k.shape[1]
    if k.shape[0] != n or k.shape[2] != head_dim:
        got = tuple(k.shape)
        raise ShapeError(
            f"k must have shape (N, Hkv, D)=({n}, {num_kv}, {head_dim}) to match q, got {got}; "
            "give it the rows and the dimension of q"
        )
    if v.shape[0] != n or v.shape[1] != num_kv:
        got = tuple(v.shape)
        raise ShapeError(
            f"v must have shape (N, Hkv, Dv)=({n}, {num_kv}, any) to match q and k, got {got}; "
            "give it their rows and heads"
        )
    if num_kv == 0 or num_heads % num_kv:
        heads = f"H={num_heads} and Hkv={num_kv}"
        raise ShapeError(
            f"the number of heads of q must be a multiple of that of k and v, got {heads}; repeat or drop heads"
        )
    if head_dim == 0 or v.shape[2] == 0:
        raise ShapeError(
            f"head dimensions must be at least 1, got D={head_dim} and Dv={v.shape[2]}; give every head an element"
        )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point, got {q.dtype}; cast q, k and v to one float dtype")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}; cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}; move it there")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[2] > 1 and x.stride(2) != 1:
            raise ValueError(f"{name} must have stride(-1) == 1, got strides {x.stride()}; call {name}.contiguous()")


def _check_rows(name: str, rows: Tensor, n: int, device: torch.device) -> Tensor:
    """Check a (N,) tensor of int32 or int64 and return it as contiguous int32."""
    if rows.dim() != 1 or rows.shape[0] != n:
        got = tuple(rows.shape)
        raise ShapeError(
            f"{name} must have shape (N,)=({n},) to match q, got {got}; build both from the same PackedTrie"
        )
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 (or int64), got {rows.dtype}; take it from PackedTrie")
    if rows.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {rows.device}; call PackedTrie.to(device)")
    if rows.dtype == torch.int32 and rows.is_contiguous():
        return rows
    return once_per_rows([rows], "int32", lambda: rows.to(torch.int32).contiguous())


def _check_sinks(sinks: Tensor, num_heads: int, device: torch.device) -> None:
    if tuple(sinks.shape) != (num_heads,):
        got = tuple(sinks.shape)
        raise ShapeError(f"sinks must have shape (H,)=({num_heads},), got {got}; pass one logit a query head")
    if not sinks.dtype.is_floating_point:
        raise ValueError(f"sinks must be floating point, got {sinks.dtype}; call sinks.float()")
    if sinks.device != device:
        raise ValueError(f"sinks must be on the device of q, {device}, got {sinks.device}; move them to one device")
