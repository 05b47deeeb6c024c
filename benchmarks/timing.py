"""Clocks of the attention benchmarks: the device's own time for one call, and the host's.

A kernel that starts on an idle device waits for its own launch, which in training overlaps with the work queued before
it. `timed` therefore queues other work first, and says apart what launching took. That work lasts as long as the
slowest launches of the last calls, whichever they were (implementations take turns, so that all of a case wait alike);
where launching takes longer all the same, the device has waited, and the timing says so.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

LEAD_MS = 5.0
MOST_LEAD_MS = 100.0  # a call that takes the host longer was compiling; the next ones need not wait for that
CYCLES_A_MS = 2_000_000  # of a device clock of 2 GHz; a slower one waits longer
_host_ms: deque[float] = deque(maxlen=64)  # of the last calls: some rounds of one case


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
        lead_ms: How long the device was busy with other work.
    """

    device_ms: float
    host_ms: float
    lead_ms: float = float("inf")

    @property
    def waited(self) -> bool:
        """Whether the device may have waited for launches, which are then in `device_ms`."""
        return self.host_ms > self.lead_ms


def lead_ms() -> float:
    """Half as long again as the slowest of the last calls that did not compile, within LEAD_MS and MOST_LEAD_MS."""
    slowest = max((ms for ms in _host_ms if ms <= MOST_LEAD_MS), default=0.0)
    return min(max(LEAD_MS, 1.5 * slowest), MOST_LEAD_MS)


def timed(work: Callable[[], object]) -> Timing:
    """Time one call on a device that is busy for `lead_ms()` while the host launches it."""
    if not torch.cuda.is_available():
        ms = wall_ms(work)
        return Timing(ms, ms)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    lead = lead_ms()
    torch.cuda._sleep(int(lead * CYCLES_A_MS))
    start.record()
    began = time.perf_counter()
    work()
    host = (time.perf_counter() - began) * 1e3
    _host_ms.append(host)
    stop.record()
    stop.synchronize()
    return Timing(float(start.elapsed_time(stop)), host, lead)


def wall_ms(work: Callable[[], object]) -> float:
    """Milliseconds of `work` by the host clock, the device idle before and after."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return (time.perf_counter() - start) * 1e3
