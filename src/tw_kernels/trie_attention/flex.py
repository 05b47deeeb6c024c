"""Trie attention through torch's FlexAttention and the BlockMask of tw_core.masks.

On a GPU flex_attention is compiled once for all lengths above one tile (128 rows), with dynamic shapes: neither another
length, nor another window, softcap or scale compiles again, since all of them reach the kernel as tensors. Shorter
lengths share a second compilation; one row and exactly one tile have one of their own. Elsewhere it runs as torch's
eager emulation, whole score matrices, forward only (torch refuses its backward on a CPU): for tests.
Sinks are applied to the result: with z = exp(lse), attention with a sink s is out * z / (z + exp(s)).
Guarded by tests/kernels/test_flex.py and test_impls.py.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from tw_core.masks import block_mask
from tw_kernels.trie_attention.call import AttentionCall
from tw_kernels.trie_attention.memo import once_per_tensor


def why_unavailable() -> str | None:
    """None: every supported torch has FlexAttention."""
    return None


def why_unsupported(call: AttentionCall) -> str | None:
    """What keeps this call from FlexAttention, or None."""
    dims = (call.q.shape[2], call.v.shape[2])
    if call.q.device.type == "cuda":
        if call.q.dtype == torch.float64:
            return "q must be float16, bfloat16 or float32, got torch.float64"
        if min(dims) < 16:
            return f"head dimensions must be at least 16, got D={dims[0]} and Dv={dims[1]}"
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return f"q, k and v must not require a gradient (FlexAttention has no backward on {call.q.device.type})"
    return None


def flex_trie_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """FlexAttention over the visible tiles. Returns out (N, H, Dv) and lse (H, N) float32."""
    mask = once_per_tensor(
        call.subtree_end,
        ("block mask", call.window),
        lambda alias: _of_any_length(block_mask(alias, depth=call.depth, window=call.window)),
    )
    # (N, H, D) -> (1, H, N, D)
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _compiled(q.device.type, _layout(call))(q, k, v, _score_mod(call), mask, call.group > 1)
        out, lse = out[0].transpose(0, 1), lse[0]
        if call.sinks is not None:
            sinks = call.sinks.to(lse.dtype)[:, None]  # (H, 1)
            out = (out * torch.sigmoid(lse - sinks).T[:, :, None]).to(out.dtype)
            lse = torch.logaddexp(lse, sinks)
    return out, lse


def _of_any_length(mask: BlockMask) -> BlockMask:
    """The mask with its number of tiles marked as a size of its own.

    Torch takes sizes that are equal at the first call for equal ever after: two tiles, met with two heads, would stay
    two, and three compile again.
    """
    for name, x in vars(mask).items():
        if isinstance(x, Tensor):
            x = x.clone()  # a view's base has sizes too
            torch._dynamo.maybe_mark_dynamic(x, [2, 3][: x.ndim - 2])
            setattr(mask, name, x)
    return mask


def _layout(call: AttentionCall) -> tuple[object, ...]:
    """What a compiled function is made for: dtype, heads, head dimensions, kinds of options."""
    heads = (call.q.shape[1], call.k.shape[1], call.q.shape[2], call.v.shape[2])
    return (call.q.dtype, *heads, call.window is not None, call.softcap is not None)


def _score_mod(call: AttentionCall) -> Callable[..., Tensor] | None:
    """Softcap and a scale other than flex's own, once per packed row; as tensors, so that no value is compiled in."""
    factor, softcap = call.scale / call.q.shape[2] ** -0.5, call.softcap
    if factor == 1.0 and softcap is None:
        return None

    def build(alias: Tensor) -> Callable[..., Tensor]:
        def scalar(value: float) -> Tensor:
            return torch.full((), value, dtype=torch.float32, device=alias.device)  # without waiting for the device

        rescale = scalar(factor)
        if softcap is None:
            return lambda score, b, h, i, j: score * rescale
        cap = scalar(softcap)
        return lambda score, b, h, i, j: cap * torch.tanh(score * rescale / cap)

    return once_per_tensor(call.subtree_end, ("score mod", factor, softcap), build)


@functools.cache
def _compiled(device_type: str, layout: tuple[object, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The compiled function of one layout; `dynamic` makes the number of rows symbolic at the first call.

    torch.compile gives up after 8 compilations of one code object, whoever asked for them; so each layout has its own.
    """
    code = _attend.__code__.replace(co_name=f"flex_attend_{'_'.join(map(str, layout))}")
    attend = types.FunctionType(code, _attend.__globals__)
    backend = "inductor" if device_type == "cuda" else "eager"
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(
        attend, dynamic=True, fullgraph=True, backend=backend
    )
    return compiled


def _attend(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, mask: BlockMask, grouped: bool) -> tuple[Tensor, Tensor]:
    out, extra = flex_attention(
        *(q, k, v, score_mod, mask),
        enable_gqa=grouped,
        kernel_options={"BACKEND": "TRITON"},  # its kernel for decoding takes no more than 128 grouped rows
        return_aux=AuxRequest(lse=True),
    )
    assert extra.lse is not None
    return out, extra.lse
