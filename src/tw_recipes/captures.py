"""Capturing CUDA graphs, such that a capture that fails leaves nothing behind.

Tests: tests/recipes/decoding/test_fixed_step.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Capture a block; the current stream is restored also where that fails, after which `clear_up` must follow.

    Workspaces of cuBLAS, one a stream and thread, are given back before and after: the graph's own then lies in its
    pool, where the next graph of the pool finds the room again, and no stream that was captured on keeps one.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


_FAILED: list[torch.cuda.CUDAGraph] = []


def clear_up(graph: torch.cuda.CUDAGraph) -> None:
    """Undo what a failed capture leaves behind, by one that succeeds.

    Torch (seen in 2.11) takes the device's generator for one in capture: whatever draws, and replays of other graphs,
    raise "Offset increment outside graph capture". The allocators go on asking the failed graph, so it must live.
    """
    number, small = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    _FAILED.extend((graph, small))
    with suppress(RuntimeError), capturing(small):
        number.add_(1)
