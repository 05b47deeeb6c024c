"""Whether impl="hopper" runs here and takes a call; loads neither triton nor Gluon before it must.

The rule: a GPU of compute capability 9.0, float16 or bfloat16, (D, Dv) in HEAD_DIMS, no window, softcap or sinks, and
Gluon kernels that compile with the installed Triton. The last is tried on one row when a call first asks a device
for a shape and a backward, deterministic or not, once a process; where it fails, one warning names the reason and
impl="auto" goes on with the portable kernels.
Guarded by tests/kernels/test_hopper.py.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings

import torch
from torch import Tensor

from tw_kernels.trie_attention.call import AttentionCall

HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))  # (D, Dv)
DTYPES = (torch.float16, torch.bfloat16)
BLOCK = 128  # rows of the plan's blocks


def why_unavailable() -> str | None:
    """Why no call can run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device was found; the Hopper kernels need one of compute capability 9.0"
    return _chip_reason(torch.cuda.current_device())


def why_unsupported(call: AttentionCall) -> str | None:
    """What keeps this call from the Hopper kernels, or None."""
    if call.q.device.type != "cuda":
        return f"q must be on a CUDA device, got {call.q.device}"
    if why_not := why_other_chip(call.q.device.index or 0):
        return why_not
    if call.q.dtype not in DTYPES:
        return f"q must be float16 or bfloat16, got {call.q.dtype}"
    for name, value in (("window", call.window), ("softcap", call.softcap), ("sinks", call.sinks)):
        if value is not None:
            return f"{name} must be None"
    if call.plan is not None and call.plan.block != BLOCK:
        return f"plan must have blocks of {BLOCK} rows, got {call.plan.block}; call make_plan(subtree_end)"
    # A symbolic dimension of torch.compile becomes the number that it equals.
    for dim, value_dim in HEAD_DIMS:
        if call.q.shape[2] == dim and call.v.shape[2] == value_dim:
            return why_broken(call.q.device.index or 0, dim, value_dim, call.q.dtype, call.deterministic)
    return f"(D, Dv) must be one of {', '.join(map(str, HEAD_DIMS))}, got ({call.q.shape[2]}, {call.v.shape[2]})"


def hopper_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Trie attention by the Hopper kernels: o (N, H, Dv) and lse (H, N) float32, the latter without gradient."""
    from tw_kernels.trie_attention.autograd import kernel_attention

    return kernel_attention(call, hopper=True)


def why_other_chip(device: int) -> str | None:
    """Why one device cannot run the kernels, or None."""
    return _chip_reason(device)


def why_broken(device: int, dim: int, value_dim: int, dtype: torch.dtype, deterministic: bool) -> str | None:
    """Why the installed Triton does not compile the forward and one backward of a shape, or None; warns once then.

    Raises:
        torch.OutOfMemoryError: The device has no room to try; the next call tries again.
    """
    tried = (device, dim, value_dim, dtype, deterministic)
    if tried not in _compile_reasons:
        with _trying:  # whoever asks meanwhile waits for the answer
            if tried not in _compile_reasons:
                _compile_reasons[tried] = _compile_reason(*tried)
    return _compile_reasons[tried]


# To torch.compile both are constants, found out while it traces: what `torch.compiler.assume_constant_result` would set
# if it did not load torch._dynamo. The cached function below is apart because Dynamo looks through a cache.
for _function in (why_other_chip, why_broken):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


@functools.cache
def _chip_reason(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the kernels are written for compute capability 9.0, got {major}.{minor}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'threadweaver[kernels]'"
    return None


_compile_reasons: dict[tuple[int, int, int, torch.dtype, bool], str | None] = {}
_trying = threading.Lock()


def _compile_reason(device: int, dim: int, value_dim: int, dtype: torch.dtype, deterministic: bool) -> str | None:
    try:
        from tw_kernels.trie_attention.hopper.launch import try_one_row

        try_one_row(torch.device("cuda", device), dim, value_dim, dtype, deterministic)
    except Exception as error:  # whatever this Triton raises
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise  # says nothing of the kernels
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _warn_once(
            f"the Hopper kernels of trie attention do not compile here (D={dim}, Dv={value_dim}, {dtype}): {reason}; "
            "impl='auto' uses the portable kernels"
        )
        return reason
    return None


@functools.cache
def _warn_once(message: str) -> None:
    """What keeps both backwards of a shape from compiling is said once."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
