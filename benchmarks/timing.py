"""Clocks of the attention benchmarks: the device's own time for one call, and the host's.

A kernel that starts on an idle device waits for its own launch, which in training overlaps with the work queued before
it. `timed` therefore queues other work first, and says apart what launching took. Where launching takes longer than
that work, as with one call a sequence, the device waits all the same: host_ms shows it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

LEAD_CYCLES = 10_000_000  # 5 ms of a device clock near 2 GHz


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Timing(NamedTuple):
    """One call.

    Attributes:
        device_ms: Between device events before and after it; by the host clock without a GPU.
        host_ms: Until it returned to the host.
    """

    device_ms: float
    host_ms: float


def timed(work: Callable[[], object]) -> Timing:
    """Time one call on a device that is busy while the host launches it, for `LEAD_CYCLES`."""
    if not torch.cuda.is_available():
        ms = wall_ms(work)
        return Timing(ms, ms)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    began = time.perf_counter()
    work()
    host = time.perf_counter() - began
    stop.record()
    stop.synchronize()
    return Timing(float(start.elapsed_time(stop)), host * 1e3)


def wall_ms(work: Callable[[], object]) -> float:
    """Milliseconds of `work` by the host clock, the device idle before and after."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return (time.perf_counter() - start) * 1e3
