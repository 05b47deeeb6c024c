"""Measures tiles for one head dimension on this GPU and keeps the fastest of each kernel in a file.

    python -m tw_kernels.trie_attention.tune --head-dim 128 --out tiles.json      some minutes
    TW_TILES=tiles.json python train.py                                           uses them (config.py)

Candidates that do not fit shared memory, or whose accumulators do not fit the registers, are not compiled. The table of
config.py needs none of this on an H100; it is meant for chips and head dimensions that the table does not know.
Guarded by tests/kernels/test_tune.py and, for `shared_bytes`, test_compile.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from torch import Tensor

from tw_kernels.trie_attention.config import (
    PLAN_BLOCK,
    Pass,
    TileConfig,
    padded,
    read_tuned,
    table_config,
    tuning_key,
)

Measure = Callable[[Pass, TileConfig], float]
"""Milliseconds of one kernel with some tiles; raises where they do not run."""

ACCUMULATORS = 208  # of the 255 registers of a thread; the rest is for addresses and operands


def shared_bytes(tiles: TileConfig, kernel: Pass, head_dim: int, value_dim: int, itemsize: int) -> int:
    """Shared memory of a block: what stays for its whole life, and one copy of what is streamed for each stage.

    Within 6 % of what Triton reports for sm_90 (tests/kernels/test_compile.py).
    """
    d, dv = padded(head_dim), padded(value_dim)
    kept, streamed = (tiles.block_n, tiles.block_m) if kernel == "dkv" else (tiles.block_m, tiles.block_n)
    stays = kept * (d if kernel == "forward" else d + dv)
    return itemsize * (stays + tiles.num_stages * streamed * (d + dv))


def accumulators(tiles: TileConfig, kernel: Pass, head_dim: int, value_dim: int) -> float:
    """float32 values that a thread holds: the sums of its outputs and one tile of logits."""
    d, dv = padded(head_dim), padded(value_dim)
    if kernel == "dkv":
        sums = tiles.block_n * (max(d, dv) if tiles.separate else d + dv)
    else:
        sums = tiles.block_m * (dv if kernel == "forward" else d)
    return (sums + tiles.block_m * tiles.block_n) / (32 * tiles.num_warps)


def candidates(
    kernel: Pass,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    shared_limit: int,
    capability: tuple[int, int] = (9, 0),
) -> list[TileConfig]:
    """Tiles worth compiling, the table's own first.

    Args:
        kernel: Which kernel.
        head_dim: D.
        value_dim: Dv.
        dtype: Of q, k and v.
        shared_limit: Bytes of shared memory that a block can have.
        capability: Of the device; descriptors need (9, 0).
    """
    known = table_config(head_dim, value_dim, dtype, capability, kernel)
    found = [known]
    sizes = (16, 32, 64, PLAN_BLOCK)
    variants = [known]
    if kernel == "dkv" and capability[0] >= 9:
        variants.append(replace(known, tma=not known.tma))
    for base, m, n, warps, stages in product(variants, sizes, sizes, (4, 8), (1, 2, 3)):
        tiles = replace(base, block_m=m, block_n=n, num_warps=warps, num_stages=stages)
        fits = shared_bytes(tiles, kernel, head_dim, value_dim, dtype.itemsize) <= shared_limit
        if fits and ACCUMULATORS / 3 <= accumulators(tiles, kernel, head_dim, value_dim) <= ACCUMULATORS:
            found.append(tiles)
    return list(dict.fromkeys(found))


def search(kernel: Pass, tried: list[TileConfig], measure: Measure) -> tuple[TileConfig, float]:
    """The fastest of some tiles and its milliseconds; those that do not run are passed over.

    Raises:
        RuntimeError: None of them runs.
    """
    times: dict[TileConfig, float] = {}
    reason = ""
    for tiles in tried:
        try:
            times[tiles] = measure(kernel, tiles)
        except Exception as error:  # out of resources, or a shape that this Triton cannot compile
            reason = f"{type(error).__name__}: {error}"
    if not times:
        raise RuntimeError(f"none of {len(tried)} tiles of the {kernel} kernel runs on this device ({reason})")
    best = min(times, key=times.__getitem__)
    return best, times[best]


def tune(
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (32, 8),
    subtree_end: Tensor | None = None,
    path: str | Path,
    report: Callable[[str], None] = print,
) -> dict[Pass, TileConfig]:
    """Measure on the current GPU and write the fastest tiles into a file, beside what it holds.

    Args:
        head_dim: D.
        value_dim: Dv; D when None.
        dtype: float16, bfloat16 or float32.
        heads: Query heads and key heads.
        subtree_end: The trie to measure on. Shape (N,), int32. None: `answers_of_a_prompt()`.
        path: The .json file, for TW_TILES.
        report: Is given one line a kernel.

    Raises:
        RuntimeError: There is no GPU, or no tiles run on it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune measures on a CUDA device, got none; without one the table of config.py is used")
    value_dim = value_dim or head_dim
    end = (answers_of_a_prompt() if subtree_end is None else subtree_end).cuda()
    capability = torch.cuda.get_device_capability()
    limit = _shared_limit()
    measure = _on_device(head_dim, value_dim, dtype, heads, end)
    best: dict[Pass, TileConfig] = {}
    for kernel in get_args(Pass):
        tried = candidates(kernel, head_dim, value_dim, dtype, limit, capability)
        tiles, milliseconds = search(kernel, tried, measure)
        report(f"{kernel}: {milliseconds:.3f} ms of {len(tried)} candidates with {tiles}")
        best[kernel] = tiles
    write_tuned(path, {tuning_key(head_dim, value_dim, dtype, capability, kernel): best[kernel] for kernel in best})
    return best


def write_tuned(path: str | Path, tiles: dict[str, TileConfig]) -> None:
    """Add tiles to a file of tuned tiles; entries of the same key are replaced."""
    path = Path(path)
    kept = read_tuned(str(path)) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: asdict(config) for key, config in sorted((kept | tiles).items())}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    read_tuned.cache_clear()


def answers_of_a_prompt(prompt: int = 2048, answers: int = 8, rows: int = 1792) -> Tensor:
    """subtree_end of a prompt with answers below it. Shape (prompt + answers * rows,), int32."""
    total = prompt + answers * rows
    ends = prompt + rows * torch.arange(1, answers + 1, dtype=torch.int32)
    return torch.cat([torch.full((prompt,), total, dtype=torch.int32), ends.repeat_interleave(rows)])


def _shared_limit() -> int:
    """Bytes of shared memory that a block can have on the current device."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"])


def _on_device(head_dim: int, value_dim: int, dtype: torch.dtype, heads: tuple[int, int], end: Tensor) -> Measure:
    """Times one kernel by device events, the others running with the table's tiles."""
    from tw_kernels.trie_attention.backward import launch_backward
    from tw_kernels.trie_attention.forward import launch_forward
    from tw_kernels.trie_attention.plan import make_plan

    n, capability = end.shape[0], torch.cuda.get_device_capability()
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(num_heads: int, dim: int) -> Tensor:
        return torch.randn((n, num_heads, dim), generator=generator, device="cuda", dtype=dtype)

    q, k, v = normal(heads[0], head_dim), normal(heads[1], head_dim), normal(heads[1], value_dim)
    grad, plan = normal(heads[0], value_dim), make_plan(end)
    table = {kernel: table_config(head_dim, value_dim, dtype, capability, kernel) for kernel in get_args(Pass)}
    options = {"scale": head_dim**-0.5, "window": None, "softcap": None}

    def forward(tiles: TileConfig) -> tuple[Tensor, Tensor]:
        return launch_forward(q, k, v, end, None, None, plan, config=tiles, **options)

    o, lse = forward(table["forward"])

    def run(kernel: Pass, tiles: TileConfig) -> None:
        if kernel == "forward":
            forward(tiles)
            return
        chosen = {"dq_config": table["dq"], "dkv_config": table["dkv"], f"{kernel}_config": tiles}
        launch_backward(q, k, v, end, None, None, plan, o, lse, grad, **chosen, **options)  # type: ignore[arg-type]

    def measure(kernel: Pass, tiles: TileConfig) -> float:
        times = []
        for _ in range(6):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run(kernel, tiles)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return float(median(times[1:]))

    return measure


def main(argv: list[str] | None = None) -> int:
    """Parse, tune, say where the tiles are."""
    parser = argparse.ArgumentParser(
        prog="python -m tw_kernels.trie_attention.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--value-dim", type=int, help="default: the head dimension")
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--heads", default="32,8", help="query heads, key heads")
    parser.add_argument("--out", required=True, help="the .json file; entries of other shapes stay")
    args = parser.parse_args(argv)
    try:
        queries, keys = (int(word) for word in args.heads.split(","))
    except ValueError:
        parser.error(f"--heads must be two numbers such as 32,8 (query heads, key heads), got {args.heads!r}")
    try:
        tune(args.head_dim, args.value_dim, dtype=getattr(torch, args.dtype), heads=(queries, keys), path=args.out)
    except (RuntimeError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    print(f"set TW_TILES={args.out} to use them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
