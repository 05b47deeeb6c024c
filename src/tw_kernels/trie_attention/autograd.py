"""Registers the kernels with torch.library: one op forward, one backward, one for the plan.

With `hopper` the two attention ops launch the Gluon kernels of hopper/, else the portable Triton kernels.

Saved for the backward: q, k, v, o, lse, sinks and the integer tensors (subtree_end, depth, plan). Computed again there:
logits and probabilities. torch.compile sees opaque ops with fake kernels; the plan op is pure, so that a compiled graph
computes it once for all its layers.
Guarded by tests/kernels/test_opcheck.py (registration, compile) and test_triton.py (values).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tw_core.errors import ShapeError
from tw_kernels.trie_attention.backward import launch_backward
from tw_kernels.trie_attention.call import AttentionCall
from tw_kernels.trie_attention.config import config_for, plan_block
from tw_kernels.trie_attention.forward import launch_forward
from tw_kernels.trie_attention.plan import BlockPlan, cached_plan, plan_data, plan_size

OPTIONS = "SymInt block, float scale, SymInt? window, float? softcap, bool hopper, bool deterministic"
PROBLEM = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor subtree_end, Tensor? depth, Tensor plan"
# Defined by schema rather than by @custom_op, whose checks at each call cost more than a launch.
torch.library.define(
    "threadweaver::trie_plan", "(Tensor subtree_end, Tensor? depth, SymInt? window, SymInt block) -> Tensor"
)
torch.library.define("threadweaver::trie_attention", f"({PROBLEM}, {OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "threadweaver::trie_attention_backward",
    f"({PROBLEM}, Tensor o, Tensor lse, Tensor grad_o, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("threadweaver::trie_plan", "CompositeExplicitAutograd")
def _plan_impl(subtree_end: Tensor, depth: Tensor | None, window: int | None, block: int) -> Tensor:
    return plan_data(subtree_end, depth, window, block)


@torch.library.register_fake("threadweaver::trie_plan")  # type: ignore[untyped-decorator]
def _plan_fake(subtree_end: Tensor, depth: Tensor | None, window: int | None, block: int) -> Tensor:
    return subtree_end.new_empty(plan_size(subtree_end.shape[0], block), dtype=torch.int32)


@torch.library.impl("threadweaver::trie_attention", "CompositeExplicitAutograd")
def _forward_impl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    subtree_end: Tensor,
    depth: Tensor | None,
    plan: Tensor,
    block: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    hopper: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """o (N, H, Dv) and lse (H, N) float32."""
    blocks = BlockPlan(plan, q.shape[0], block, window)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        if hopper:
            from tw_kernels.trie_attention.hopper import launch

            return launch.launch_forward(q, k, v, subtree_end, blocks, scale=scale)
        return launch_forward(
            _addressable(q, block),
            _addressable(k, block),
            _addressable(v, block),
            subtree_end,
            depth,
            sinks,
            blocks,
            scale=scale,
            window=window,
            softcap=softcap,
            config=config_for(q, v, "forward"),
        )


@torch.library.register_fake("threadweaver::trie_attention")  # type: ignore[untyped-decorator]
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n, num_heads, _dim = q.shape
    return q.new_empty((n, num_heads, v.shape[2])), q.new_empty((num_heads, n), dtype=torch.float32)


@torch.library.impl("threadweaver::trie_attention_backward", "CompositeExplicitAutograd")
def _backward_impl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    subtree_end: Tensor,
    depth: Tensor | None,
    plan: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    block: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    hopper: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks, the last one empty without sinks."""
    blocks = BlockPlan(plan, q.shape[0], block, window)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        if hopper:
            from tw_kernels.trie_attention.hopper import launch

            dq, dk, dv = launch.launch_backward(
                q, k, v, subtree_end, blocks, o, lse, grad_o, scale=scale, deterministic=deterministic
            )
            return dq, dk, dv, q.new_empty(0)
        dq, dk, dv, dsinks = launch_backward(
            _addressable(q, block),
            _addressable(k, block),
            _addressable(v, block),
            subtree_end,
            depth,
            sinks,
            blocks,
            o,
            lse,
            _addressable(grad_o, block),
            scale=scale,
            window=window,
            softcap=softcap,
            dq_config=config_for(q, v, "dq"),
            dkv_config=config_for(q, v, "dkv"),
        )
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("threadweaver::trie_attention_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, subtree_end, depth, plan, *options = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # or each backward fills zeros for lse
    ctx.save_for_backward(q, k, v, sinks, subtree_end, depth, plan, o, lse)
    ctx.options = options


# The backward op has no derivative of its own: without this a second one is zero, with a mere warning.
@once_differentiable
def _backward(ctx: Any, grad_o: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_o is None:
        return (None,) * 13
    *tensors, o, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = torch.ops.threadweaver.trie_attention_backward(*tensors, o, lse, grad_o, *ctx.options)
    sinks = tensors[3]
    return dq, dk, dv, None if sinks is None else dsinks, *[None] * 9


torch.library.register_autograd("threadweaver::trie_attention", _backward, setup_context=_setup_context)


class _EagerAttention(torch.autograd.Function):
    """The registered autograd without its reading of the schema, which costs more than a launch at every call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = torch.ops.threadweaver.trie_attention(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward: Any = staticmethod(_backward)


def triton_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Trie attention by the portable Triton kernels; see `kernel_attention`."""
    return kernel_attention(call, hopper=False)


def kernel_attention(call: AttentionCall, *, hopper: bool) -> tuple[Tensor, Tensor]:
    """Trie attention by the kernels of this package.

    Args:
        call: A validated call of at least one row. Its plan, when given, must be that of its subtree_end and window.
        hopper: Whether the Gluon kernels for sm_90 compute it; they must support the call.

    Returns:
        o (N, H, Dv) in q's dtype and lse (H, N) in float32, the latter without gradient.

    Raises:
        ShapeError: The plan was made for another number of rows.
        ValueError: The plan was made for another window, in blocks too small for the tiles, or on another device.
    """
    q, scale, end, depth = call.q, call.scale, call.subtree_end, call.depth
    if scale < 0:  # the kernels scale after taking a maximum
        q, scale = -q, -scale
    scale = max(scale, 1e-30)  # and would meet 0 times -inf
    if not torch.compiler.is_compiling() and end.is_inference() and not torch.is_inference_mode_enabled():
        # Autograd cannot save tensors of inference mode.
        end = end.clone()
    if not torch.compiler.is_compiling() and depth is not None and depth.is_inference():
        depth = depth if torch.is_inference_mode_enabled() else depth.clone()
    if call.plan is not None:
        _check_plan(call.plan, call)
        block, data = call.plan.block, call.plan.data
        if not torch.compiler.is_compiling() and data.is_inference() and not torch.is_inference_mode_enabled():
            data = data.clone()
    else:
        block = plan_block(end.device)
        if torch.compiler.is_compiling():
            data = torch.ops.threadweaver.trie_plan(end, depth, call.window, block)
        else:
            data = cached_plan(end, depth, call.window, block).data
    options = (block, scale, call.window, call.softcap, hopper, call.deterministic)
    eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    attend: Any = _EagerAttention.apply if eager else torch.ops.threadweaver.trie_attention
    o, lse = attend(q, call.k, call.v, call.sinks, end, depth, data, *options)
    return o, lse


def _check_plan(plan: BlockPlan, call: AttentionCall) -> None:
    n = call.q.shape[0]
    if plan.num_rows != n:
        raise ShapeError(f"plan must be for N={n} rows, got one for {plan.num_rows}; call make_plan(subtree_end)")
    if plan.window != call.window:
        raise ValueError(
            f"plan must be for window={call.window}, got one for window={plan.window}; "
            "call make_plan(subtree_end, window=...), one plan for each window"
        )
    if plan.block % (wanted := plan_block(call.q.device)):
        raise ValueError(f"plan must have blocks of {wanted} rows, got {plan.block}; leave out make_plan's block")
    if plan.data.device != call.q.device:
        raise ValueError(f"plan must be on the device of q, {call.q.device}, got {plan.data.device}; build it there")


def _addressable(x: Tensor, block: int) -> Tensor:
    """`x` with a contiguous last dimension and strides whose offsets inside a tile fit 32 bits."""
    fits = max(abs(stride) for stride in x.stride()) * block < 2**31 if x.shape[0] > 1 else True
    return x if x.stride(-1) == 1 and fits else x.contiguous()
