"""What ptxas makes of every kernel and every tile configuration of the table, for sm_90 and for other chips.

No GPU is needed: Triton compiles for a named target, in processes of their own because this one may be interpreting.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tw_kernels.trie_attention.config import PLAN_BLOCK, TileConfig, padded, pick_config
from tw_kernels.trie_attention.plan_kernels import CHUNK
from tw_kernels.trie_attention.tune import shared_bytes

SHARED_90, SHARED_86 = 232_448, 101_376  # bytes that a block can have
DIMS = [(16, 16), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)]
REGISTERS = 65_536  # of a multiprocessor, which holds one block at least
PLAIN: dict[str, Any] = {"window": False, "softcap": False, "sinks": False}


def table_tiles(kernel: str, dims: tuple[int, int], dtype: str, capability: int = 90) -> TileConfig:
    return pick_config(*dims, getattr(torch, dtype), divmod(capability, 10), kernel)


def job(kernel: str, dims: tuple[int, int], dtype: str, capability: int = 90, **options: Any) -> dict[str, Any]:
    """One compilation as the launcher would ask for it."""
    tiles = table_tiles(kernel, dims, dtype, capability)
    options = PLAIN | options
    constexprs: dict[str, Any] = {
        "D": dims[0], "DV": dims[1], "BLOCK_D": padded(dims[0]), "BLOCK_DV": padded(dims[1]),
        "KV_HEADS": 8, "GROUP": 4, "BLOCK": 128, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "HAS_SOFTCAP": options["softcap"], "HEAD_SLOWEST": tiles.head_slowest, "PRECISION": "ieee",
    }  # fmt: skip
    if kernel == "dkv":
        tma = tiles.tma and all(dim == padded(dim) for dim in dims)
        only_dv = options.get("only_dv", False)
        constexprs |= {"WITH_DK": not only_dv, "WITH_DV": only_dv or not tiles.separate, "TMA": tma}
    return {
        "module": "forward" if kernel == "forward" else "backward",
        "kernel": f"_{kernel}_kernel",
        "dtype": dtype,
        "capability": capability,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "constexprs": constexprs,
        "absent": [name for name, has in (("depth_ptr", "window"), ("sinks_ptr", "sinks")) if not options[has]],
    }


# Bytes a thread may spill where the tiles measured fastest do (docs/performance.md); all others spill nothing.
SPILLS = {("_forward_kernel", 256): 16, ("_dq_kernel", 256): 4}

KERNELS = ("forward", "dq", "dkv")
JOBS_90 = [job(kernel, dims, "bfloat16") for kernel in KERNELS for dims in DIMS]
JOBS_90 += [job("dkv", dims, "bfloat16", only_dv=True) for dims in [(192, 128), (256, 256)]]
JOBS_90 += [job(kernel, (128, 128), "float16", window=True) for kernel in KERNELS]
JOBS_OTHER = [job(kernel, dims, "float32") for kernel in KERNELS for dims in [(64, 64), (128, 128), (256, 256)]]
JOBS_OTHER += [
    job(kernel, dims, "bfloat16", capability=80) for kernel in KERNELS for dims in [(64, 64), (128, 128), (256, 256)]
]
OPTIONED = [
    job(kernel, (128, 128), "bfloat16", window=True, softcap=True, sinks=kernel == "forward") for kernel in KERNELS
]


def plan_job(kernel: str, window: bool = False, **constexprs: Any) -> dict[str, Any]:
    """One compilation of a kernel that builds the plan, as `launch_plan` asks for it."""
    return {
        "module": "plan_kernels",
        "kernel": f"_{kernel}_kernel",
        "dtype": "int32",
        "capability": 90,
        "num_warps": 8 if kernel == "order" else 1,
        "num_stages": 3,
        "constexprs": constexprs,
        "absent": [] if window else ["depth_ptr"],
    }


PLAN_JOBS = [plan_job("bounds", window, BLOCK=PLAN_BLOCK) for window in (False, True)]
PLAN_JOBS += [plan_job("lists", BLOCK=PLAN_BLOCK, CHUNK=CHUNK, HAS_WINDOW=window) for window in (False, True)]
PLAN_JOBS.append(plan_job("order", CHUNK=CHUNK))


def compile_all(jobs: list[dict[str, Any]], processes: int = 2) -> list[dict[str, Any]]:
    """Reports of the jobs, in order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def work(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.compiled"],
            input="\n".join(map(json.dumps, some)),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(work, [jobs[i::processes] for i in range(processes)]))
    reports: list[dict[str, Any]] = [{}] * len(jobs)
    for i, part in enumerate(parts):
        reports[i::processes] = part
    return reports


def described(report: dict[str, Any]) -> str:
    made = report["job"]
    sizes = {name: made["constexprs"][name] for name in ("D", "DV", "BLOCK_M", "BLOCK_N")}
    figures = {name: report[name] for name in ("shared", "wgmma", "registers", "spill_bytes", "serialized")}
    return f"{made['kernel']} sm_{made['capability']} {made['dtype']} {sizes} {figures}"


def test_sm_90_table() -> None:
    """Shared memory and registers within a block's, wgmma and in parallel, nothing spilled, N left general."""
    reports = compile_all(JOBS_90)
    broken = [
        described(report)
        for report in reports
        if report["shared"] > SHARED_90
        or report["registers"] * 32 * report["job"]["num_warps"] > REGISTERS
        or not report["wgmma"]
        or report["serialized"]
        or report["spill_bytes"] > SPILLS.get((report["job"]["kernel"], report["job"]["constexprs"]["D"]), 0)
    ]
    assert not broken, "\n".join(broken)
    for report in reports:
        assert {"n_rows", "num_blocks", "window"} <= set(report["general"])
    # What `tune.py` takes shared memory to be before it compiles; a pass for dv alone keeps no v.
    for report in (report for report in reports if report["job"]["constexprs"].get("WITH_DK", True)):
        dims = (report["job"]["constexprs"]["D"], report["job"]["constexprs"]["DV"])
        kernel, dtype = report["job"]["kernel"].strip("_").removesuffix("_kernel"), report["job"]["dtype"]
        guess = shared_bytes(table_tiles(kernel, dims, dtype), kernel, *dims, itemsize=2)
        assert abs(report["shared"] - guess) <= max(0.06 * guess, 4096), described(report)


def test_the_kernels_of_the_plan_compile_for_any_length() -> None:
    for report in compile_all(PLAN_JOBS):
        assert report["spill_bytes"] == 0, report
        assert report["shared"] <= SHARED_86, report
        assert "num_blocks" in report["general"]


def test_options_and_other_chips_fit() -> None:
    """float32 and older chips stay within the shared memory of the smallest, and every option compiles."""
    for report in compile_all(JOBS_OTHER + OPTIONED):
        limit = SHARED_90 if report["job"] in OPTIONED else SHARED_86
        assert report["shared"] <= limit, described(report)
