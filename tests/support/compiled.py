"""Compile a Triton kernel for sm_90 without a GPU and read what ptxas made of it.

Run as a process of its own, without TRITON_INTERPRET: reads one JSON job a line, writes one JSON report a line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from typing import Any

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
ROWS = {"end_ptr", "depth_ptr", "plan_ptr", "bounds_ptr"}
FLOATS = {"lse_ptr", "delta_ptr"}


def compile_kernel(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one job: module, kernel, dtype, constexprs, absent pointers, num_warps, num_stages, capability."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"tw_kernels.trie_attention.{job['module']}"), job["kernel"])
    constexprs: dict[str, Any] = dict(job["constexprs"])
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs or name in job["absent"]:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)
        elif constexprs.get("TMA") and name in ("q_ptr", "do_ptr"):
            dim = constexprs["D" if name == "q_ptr" else "DV"]
            signature[name] = f"tensordesc<{POINTERS[job['dtype']][1:]}[{constexprs['BLOCK_M']}, {dim}]>"
        elif name.endswith("_ptr"):
            rows = "*i32" if name in ROWS else "*fp32" if name in FLOATS else POINTERS[job["dtype"]]
            signature[name] = rows
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name] = "i32"
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
    capability = job.get("capability", 90)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # Triton prints what ptxas -v said, see `main`
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": job["num_warps"], "num_stages": job["num_stages"], "enable_fp_fusion": True},
        )
    said = log.getvalue()
    return {
        "job": job,
        "general": [p.name for p in kernel.params if p.do_not_specialize],
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)),
        "serialized": bool(re.search(r"C751[0-9]", said)),
    }


def main() -> None:
    """Compile every job of stdin anew, with ptxas's own report."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update({"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"})
    for line in filter(str.strip, sys.stdin):
        print(json.dumps(compile_kernel(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
