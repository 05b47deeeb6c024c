"""Capturing CUDA graphs: what a graph holds fixed of a model, and captures that leave nothing behind when they fail.

Tests: tests/recipes/decoding/test_fixed_step.py and tests/recipes/test_checkpoint_graphs.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn


def held_fixed(module: nn.Module) -> list[Any]:
    """What graphs hold fixed of a module: where its parameters lie, which are trained, its hooks, its PEFT adapters."""
    held: list[Any] = []
    for part in module.modules():  # once, and without the generators of named parameters: graphs ask at every call
        held += [(own.data_ptr(), own.requires_grad) for own in part._parameters.values() if own is not None]
        held += (*part._forward_hooks, *part._forward_pre_hooks)
        if adapts(part):
            held.append((part.disable_adapters, part.merged, *part.active_adapters))
    return held


def adapts(part: nn.Module) -> bool:
    """Whether a module is a layer of PEFT."""
    return "base_layer" in part._modules


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
