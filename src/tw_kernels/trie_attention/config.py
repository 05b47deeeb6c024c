"""Tile sizes of the Triton kernels: a table per chip, head dimension and dtype, and what `tune.py` measured.

TW_TILES=FILE in the environment names a file of `python -m tw_kernels.trie_attention.tune`: its entries for this chip,
dtype, head dimensions and version of Triton go before the table.
Guarded by tests/kernels/test_triton.py, test_compile.py and test_tune.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Pass = Literal["forward", "dq", "dkv"]

# Rows of a plan's blocks on a GPU; every tile size divides it. Smaller blocks skip more and make longer lists.
PLAN_BLOCK = 128
# In Triton's interpreter: the tests' tries are small, and so that they have skipped, full and partial tiles.
INTERPRETER_PLAN_BLOCK = 64


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is tiled and compiled.

    Attributes:
        block_m: Query rows of a tile.
        block_n: Key rows of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
        head_slowest: Finish one key head before the next (`tiles.scheduled`).
        separate: Launch the dk/dv kernel twice, once for each.
        tma: Load queries by tensor descriptors where their layout allows it (dk/dv kernel; sm_90 and later).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    head_slowest: bool = True
    separate: bool = False
    tma: bool = False

    def options(self) -> dict[str, int | bool]:
        """As launch arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_SLOWEST": self.head_slowest,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            # Triton 3.10 turns contraction to multiply-add off by default.
            "enable_fp_fusion": True,
        }


_INTERPRETER = TileConfig(64, 64, 1, 1)

# (padded head dimension) -> tiles; 16-bit inputs. Measured on one H100 (docs/performance.md); what spills is
# named in tests/kernels/test_compile.py.
_SM90_16BIT: dict[Pass, dict[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 4, 3),
        128: TileConfig(64, 64, 4, 3),
        256: TileConfig(128, 64, 8, 2),
    },
    "dq": {
        64: TileConfig(64, 64, 4, 3),
        128: TileConfig(128, 64, 8, 3),
        256: TileConfig(128, 64, 8, 1),
    },
    "dkv": {
        64: TileConfig(64, 64, 4, 2, head_slowest=False),
        128: TileConfig(64, 64, 4, 2, head_slowest=False, tma=True),
        256: TileConfig(32, 128, 8, 2, head_slowest=False, separate=True, tma=True),
    },
}
# The dk/dv kernel where no descriptor fits, that is for head dimensions such as 80 and 96.
_SM90_DKV_WITHOUT_TMA = TileConfig(32, 128, 8, 2, head_slowest=False)
# Other chips (sm_80 and later): unmeasured, within the 99 KiB of shared memory that the smallest of them gives a block.
_ANY_16BIT: dict[Pass, dict[int, TileConfig]] = {
    "forward": {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 32, 4, 2), 256: TileConfig(32, 32, 4, 1)},
    "dq": {64: TileConfig(64, 32, 4, 2), 128: TileConfig(64, 32, 4, 1), 256: TileConfig(32, 32, 4, 1)},
    "dkv": {64: TileConfig(32, 64, 4, 2), 128: TileConfig(32, 64, 4, 1), 256: TileConfig(32, 32, 4, 1)},
}
# float32 on every chip: ordinary arithmetic, a tool for checks rather than for speed.
_ANY_32BIT: dict[Pass, dict[int, TileConfig]] = {
    "forward": {64: TileConfig(32, 32, 8, 1), 128: TileConfig(32, 32, 8, 1), 256: TileConfig(16, 16, 4, 1)},
    "dq": {64: TileConfig(32, 32, 8, 1), 128: TileConfig(32, 32, 8, 1), 256: TileConfig(16, 16, 4, 1)},
    "dkv": {64: TileConfig(32, 32, 8, 1), 128: TileConfig(32, 32, 8, 1), 256: TileConfig(16, 16, 4, 1)},
}


def pick_config(
    head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, kernel: Pass
) -> TileConfig:
    """The tuned tiles where TW_TILES has some, else the table's.

    Args:
        head_dim: D, 1..256.
        value_dim: Dv, 1..256.
        dtype: float16, bfloat16 or float32.
        capability: `torch.cuda.get_device_capability(device)`; None in Triton's interpreter.
        kernel: Which kernel.

    Raises:
        ValueError: A head dimension is out of range, or TW_TILES names a file that is none of `tune.py`.
    """
    if capability is not None and (path := os.environ.get("TW_TILES")):
        tuned = read_tuned(path).get(tuning_key(head_dim, value_dim, dtype, capability, kernel))
        if tuned is not None:
            return tuned
    return table_config(head_dim, value_dim, dtype, capability, kernel)


def table_config(
    head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, kernel: Pass
) -> TileConfig:
    """The table's tiles, whatever TW_TILES says; arguments as in `pick_config`.

    Raises:
        ValueError: A head dimension is out of range.
    """
    width = max(head_dim, value_dim)
    if not 1 <= width <= 256:
        raise ValueError(f"head dimensions must be at most 256, got D={head_dim} and Dv={value_dim}; split the heads")
    if capability is None:
        return _INTERPRETER
    if dtype == torch.float32:
        table = _ANY_32BIT
    elif capability[0] == 9:
        table = _SM90_16BIT
        if kernel == "dkv" and 64 < width <= 128 and any(dim != padded(dim) for dim in (head_dim, value_dim)):
            return _SM90_DKV_WITHOUT_TMA
    else:
        table = _ANY_16BIT
    return table[kernel][max(64, padded(width))]


def tuning_key(head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int], kernel: Pass) -> str:
    """Under which name tuned tiles are kept, for example "sm_90 triton 3.6.0 bfloat16 128x128 forward"."""
    chip = "sm_" + "".join(map(str, capability))
    return f"{chip} triton {_triton_version()} {str(dtype).removeprefix('torch.')} {head_dim}x{value_dim} {kernel}"


@cache
def _triton_version() -> str:
    """Asked once: it reads the package's metadata, which takes longer than a launch."""
    return version("triton")


@lru_cache(maxsize=4)
def read_tuned(path: str) -> dict[str, TileConfig]:
    """The tiles of a file of `tune.py`, read once a process.

    Raises:
        ValueError: The file is missing, or is none of `tune.py`.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        tiles = {key: TileConfig(**fields) for key, fields in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"TW_TILES must name a file that `python -m tw_kernels.trie_attention.tune` wrote, got {path!r} ({error}); "
            "write it, or unset TW_TILES"
        ) from error
    for key, config in tiles.items():
        if any(PLAN_BLOCK % size or size < 16 for size in (config.block_m, config.block_n)):
            raise ValueError(f"tiles must divide {PLAN_BLOCK}, got {config} for {key!r} in TW_TILES; tune again")
    return tiles


def config_for(q: Tensor, v: Tensor, kernel: Pass) -> TileConfig:
    """`pick_config` for q (N, H, D) and v (N, Hkv, Dv) on their device; off a GPU, the interpreter's tiles."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    return pick_config(q.shape[2], v.shape[2], q.dtype, capability, kernel)


def plan_block(device: torch.device) -> int:
    """Rows of a plan's blocks on a device."""
    return PLAN_BLOCK if device.type == "cuda" else INTERPRETER_PLAN_BLOCK


def padded(dim: int) -> int:
    """Columns of a tile that holds `dim`: a power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def matmul_precision(dtype: torch.dtype) -> str:
    """How products of a dtype are computed: exactly, unless torch's settings allow TF32 for float32."""
    if dtype != torch.float32:
        return "ieee"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # after a setting through torch's newer names the older one cannot be read
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
