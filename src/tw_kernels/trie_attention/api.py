"""Public face of trie attention: validate, choose an implementation, call it.

The implementations mean the same (`call.py` defines it) and differ in speed and in what they accept; `IMPLS` lists
them. Backends are imported inside their calls, so that importing this file loads neither triton nor torch's compiler.
Guarded by tests/kernels/test_api.py (arguments, choice) and test_impls.py (one suite for all implementations).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from tw_kernels.trie_attention import dense, flex, varlen
from tw_kernels.trie_attention.call import AttentionCall
from tw_kernels.trie_attention.hopper import support as hopper
from tw_kernels.trie_attention.reference import reference_attention

if TYPE_CHECKING:
    from tw_kernels.trie_attention.plan import BlockPlan


class AttentionOutput(NamedTuple):
    """What `trie_attention(..., return_lse=True)` returns."""

    out: Tensor
    """Shape (N, H, Dv), dtype of q."""
    lse: Tensor
    """Natural log of the sum of exponentials, sink included. Shape (H, N), float32 or float64; without gradient."""


class ImplChoice(NamedTuple):
    """What impl="auto" picks and why."""

    name: str
    reason: str


class Impl(NamedTuple):
    """One implementation: why this machine cannot run it, why it cannot take a call, and the call itself."""

    why_unavailable: Callable[[], str | None]
    why_unsupported: Callable[[AttentionCall], str | None]
    run: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NO_TRITON = "triton is not installed; pip install 'threadweaver[kernels]'"
INTERPRETER = "set TRITON_INTERPRET=1 before Python starts to run Triton's interpreter"


def _triton_unavailable() -> str | None:
    if not TRITON_INSTALLED:
        return NO_TRITON
    if not torch.cuda.is_available() and not _interpreting():
        return f"no CUDA device was found; {INTERPRETER}"
    return None


def _triton_unsupported(call: AttentionCall) -> str | None:
    if not TRITON_INSTALLED:
        return NO_TRITON
    if call.q.device.type != "cuda" and not _interpreting():
        return f"q must be on a CUDA device, got {call.q.device}; {INTERPRETER}"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"q must be float16, bfloat16 or float32, got {call.q.dtype}"
    if call.q.dtype == torch.bfloat16 and _interpreting():
        return "q must be float16 or float32 under TRITON_INTERPRET=1 (the interpreter is wrong in bfloat16)"
    if max(call.q.shape[2], call.v.shape[2]) > 256:
        return f"head dimensions must be at most 256, got D={call.q.shape[2]} and Dv={call.v.shape[2]}"
    return None


def _triton_run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    from tw_kernels.trie_attention.autograd import triton_attention

    return triton_attention(call)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


IMPLS: dict[str, Impl] = {
    "hopper": Impl(hopper.why_unavailable, hopper.why_unsupported, hopper.hopper_attention),
    "triton": Impl(_triton_unavailable, _triton_unsupported, _triton_run),
    "flex": Impl(flex.why_unavailable, flex.why_unsupported, flex.flex_trie_attention),
    "varlen": Impl(varlen.why_unavailable, varlen.why_unsupported, varlen.varlen_attention),
    "dense": Impl(lambda: None, dense.why_unsupported, dense.dense_attention),
    "reference": Impl(lambda: None, lambda call: None, reference_attention),
}

# auto tries these in turn. On a GPU the block-sparse kernels come first. On a CPU long segments (`varlen.pays_on_cpu`)
# are worth a loop over them: forward + backward of a trajectory of 3,218 rows took 281 ms against 542 ms for SDPA over
# all pairs, of 797 rows 20 against 31 ms, of 314 rows 6.0 against 5.2 ms (float32, 8 heads, D 64, two cores of a Xeon).
GPU_ORDER: tuple[str, ...] = ("hopper", "triton", "flex", "varlen", "dense", "reference")
CPU_ORDER: tuple[str, ...] = ("dense", "reference")
CPU_ORDER_LONG_SEGMENTS = ("varlen", "dense", "reference")


# fmt: off
@overload
def trie_attention(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, *, position_ids: Tensor | None = None,
    scale: float | None = None, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    impl: str = "auto", deterministic: bool | None = None, return_lse: Literal[False] = False,
    plan: BlockPlan | None = None,
) -> Tensor: ...
@overload
def trie_attention(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, *, position_ids: Tensor | None = None,
    scale: float | None = None, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    impl: str = "auto", deterministic: bool | None = None, return_lse: Literal[True],
    plan: BlockPlan | None = None,
) -> AttentionOutput: ...
# fmt: on
def trie_attention(
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
    impl: str = "auto",
    deterministic: bool | None = None,
    return_lse: bool = False,
    plan: BlockPlan | None = None,
) -> Tensor | AttentionOutput:
    """Softmax attention in which each row of a packed trie sees its ancestors and itself.

    With e = `subtree_end`, query i reads keys {j : j <= i < e[j]}; on a one-chain trie this is causal, on several
    chains it is ordinary padding-free packing.

    Args:
        q: Queries. Shape (N, H, D), stride(-1) == 1; any float dtype, of which each implementation says what it takes.
        k: Keys. Shape (N, Hkv, D) with H a multiple of Hkv, dtype and device of `q`, stride(-1) == 1.
        v: Values. Shape (N, Hkv, Dv), dtype and device of `q`, stride(-1) == 1.
        subtree_end: `PackedTrie.subtree_end`. Shape (N,), int32 (int64 is converted once), on the device of `q`.
        position_ids: `PackedTrie.position_ids`, the depth of each row. Shape (N,), int32 or int64. Only a window needs
            it, and derives it from `subtree_end` when it is None; it must rise by one from parent to child.
        scale: Logit scale. Defaults to 1 / sqrt(D).
        window: Sliding window measured in depth: the rows that a query sees along its path, itself included.
        softcap: Logits become softcap * tanh(logits / softcap).
        sinks: One extra logit a head, without a value (attention sinks). Shape (H,), float; receives a gradient.
        impl: "auto", or a key of `available_impls()`; a named implementation runs or raises, it never falls back.
            `choose_impl` says what "auto" picks.
        deterministic: Whether the backward must be bitwise repeatable. Defaults to
            `torch.are_deterministic_algorithms_enabled()`. Without it impl="hopper" adds up dq in any order.
        return_lse: Return `AttentionOutput(out, lse)`.
        plan: `make_plan(subtree_end)`, to spare impl="hopper" and "triton" its planning; the others ignore it.

    Returns:
        Shape (N, H, Dv), dtype of `q` (autocast's dtype under autocast); reductions run in float32, in float64 for
        float64. With `return_lse`, an `AttentionOutput`. Gradients of impl="triton" and "hopper" have none of
        their own, so that a second backward raises, as do torch.func's transforms; impl="reference" can do both.

    Raises:
        ShapeError: A shape differs from the above.
        ValueError: A dtype, device, stride or option is wrong, or the named `impl` cannot run here or not this call.
        TrieError: `subtree_end` is not that of a forest; checked by impl="reference", and by all under TW_DEBUG=1.

    Source:
        FlashAttention-2 (arXiv:2307.08691) for the blocked softmax; the interval test replaces causality.
    """
    call = AttentionCall.build(
        q,
        k,
        v,
        subtree_end,
        position_ids=position_ids,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        deterministic=deterministic,
        plan=plan,
        with_lse=return_lse,
    )
    if impl == "auto":
        impl = choose_impl(call).name
    else:
        _check_impl(impl, call)
    # No row, nothing to launch: the reference's empty tensors are differentiable too.
    out, lse = (IMPLS[impl].run if call.num_rows else reference_attention)(call)
    if not return_lse:
        return out
    assert lse is not None, f"{impl} was asked for lse and returned none"
    return AttentionOutput(out, lse.detach())


def available_impls() -> dict[str, str | None]:
    """Say for each implementation why it cannot run on this machine, or None when it can."""
    return {name: impl.why_unavailable() for name, impl in IMPLS.items()}


def choose_impl(call: AttentionCall) -> ImplChoice:
    """Say which implementation impl="auto" uses for a call, and why.

    The rule: the first of `GPU_ORDER` (tensors on a GPU), `CPU_ORDER_LONG_SEGMENTS` (elsewhere, 1,024 rows or more in
    segments of 32 rows or more on average) or `CPU_ORDER` (elsewhere) that accepts the call's device, dtype, head
    dimensions and options. While torch.compile traces, the segments are unknown and count as short.

    Args:
        call: `AttentionCall.build(q, k, v, subtree_end, window=..., ...)`, the arguments of `trie_attention`.
    """
    if call.q.device.type == "cuda":
        order = GPU_ORDER
    else:
        order = CPU_ORDER_LONG_SEGMENTS if varlen.pays_on_cpu(call) else CPU_ORDER
    passed: list[str] = []
    for name in order:
        why_not = IMPLS[name].why_unsupported(call)
        if why_not is None:
            reason = f"the first of {', '.join(order)} that takes this call on {call.q.device.type}"
            return ImplChoice(name, "; ".join([reason, *passed]))
        passed.append(f"{name}: {why_not}")
    raise AssertionError("the reference accepts every call")


def _check_impl(name: str, call: AttentionCall) -> None:
    """Raise unless the named implementation exists, runs on this machine and accepts the call."""
    if name not in IMPLS:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(IMPLS)}, got {name!r}")
    if why_not := IMPLS[name].why_unsupported(call):
        # "q must be on a CUDA device" alone helps nobody on a machine without one.
        reasons = "; ".join(dict.fromkeys(filter(None, (why_not, IMPLS[name].why_unavailable()))))
        able = [other for other in IMPLS if IMPLS[other].why_unsupported(call) is None]
        raise ValueError(
            f"impl={name!r} cannot run this call: {reasons}; or use impl='auto' or one of {', '.join(able)}"
        )
