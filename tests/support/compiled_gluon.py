"""Compile the Hopper kernels for sm_90a without a GPU and read what ptxas made of them.

Run as a process of its own by a Python whose Triton is to be tried (no TRITON_INTERPRET): reads one JSON job a line,
{"kernel", "dims", "dtype", and the constants that differ from launch.py's}, writes one JSON report a line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from typing import Any

ELEMENTS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
POINTERS = {"plan_ptr": "*i32", "end_ptr": "*i32", "counter_ptr": "*i32", "lse_ptr": "*fp32"}


def signature_of(job: dict[str, Any]) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel of a job, the types of its arguments and its constants, as launch.py would have them."""
    import torch

    from tw_kernels.trie_attention.hopper import backward, forward, launch, wide

    dim, value_dim, dtype = *job["dims"], getattr(torch, job["dtype"])
    constants = {"D": dim, "BLOCK": 128, "STAGES": launch.STAGES}
    if job["kernel"] == "forward":
        kernel = forward._forward_kernel
        constants |= {"DV": value_dim} | launch.FORWARD_TILES[dim, value_dim]
        keys, columns = constants["KEYS"], constants["COLUMNS"]
        tiles = {"q": (64, columns, dtype), "k": (keys, columns, dtype), "v": (keys, value_dim, dtype)}
        tiles |= {"o": (64, value_dim, dtype), "end": (0, keys, torch.int32)}
    elif job["kernel"] == "wide_backward":
        kernel = wide._wide_dkv_kernel
        constants |= {"DV": value_dim, **launch.WIDE_TILES[dim, value_dim]} | job["constants"]
        columns, tile = constants["COLUMNS"], constants["TILE"]
        tiles = dict.fromkeys(("k", "dk"), (64, columns, dtype)) | dict.fromkeys(("v", "dv"), (64, value_dim, dtype))
        tiles |= {"q": (tile, columns, dtype), "do": (tile, value_dim, dtype), "stats": (0, tile, torch.float32)}
    else:
        kernel = backward._dkv_kernel
        constants |= {"WITH_DQ": True}
        tiles = dict.fromkeys(("q", "do", "dk", "dv"), (64, dim, dtype))
        tiles |= dict.fromkeys(("k", "v"), (128, dim, dtype))
        tiles |= {"dq": (64, dim // 2, torch.float32), "stats": (0, 64, torch.float32)}
    constants |= job["constants"]
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            rows, columns, element = tiles[name.removesuffix("_desc")]
            block = [1, rows, columns] if rows else [columns]
            short = ELEMENTS[str(element).removeprefix("torch.")]
            signature[name] = f"tensordesc<{short}{block},{launch.tile_layout(rows, columns, element)!r}>"
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in ("scale", "factor") else "i32")
    return kernel, signature, constants


def compile_kernel(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one job and report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from tw_kernels.trie_attention.hopper import launch

    kernel, signature, constants = signature_of(job)
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # Triton prints what ptxas -v said, see `main`
        compiled = triton.compile(
            GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", 90, 32),
            options=launch.OPTIONS,
        )
    said = log.getvalue()
    return {
        "job": job,
        "triton": triton.__version__,
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)),
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        "serialized": re.findall(r"C75\d\d", said),
        "general": [p.name for p in kernel.params if p.do_not_specialize],
    }


def main() -> None:
    """Compile every job of stdin anew, with ptxas's own report."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update({"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"})
    for line in filter(str.strip, sys.stdin):
        print(json.dumps(compile_kernel(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
