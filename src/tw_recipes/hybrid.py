"""Recurrent layers on a trie, through the optional package tree-recurrence (Gated DeltaNet, Mamba2, LFM2 convolutions).

That package reads a trie as a list of segments (runs of rows without a fork inside) from `tree_*` keyword arguments
that reach every layer. `tree_kwargs` derives them from subtree_end and depth, once per forward, on the host.
"""

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TREE_KWARGS = ("tree_cu_seqlens_q", "tree_segment_parents")


def available() -> bool:
    """Whether tree-recurrence can be imported."""
    return importlib.util.find_spec("tree_recurrence") is not None


def has_recurrence(model: nn.Module) -> bool:
    """Whether a layer of `model` carries a state or a convolution along the row."""
    return any("A_log" in m._parameters or isinstance(m, nn.Conv1d) for m in model.modules())


def follow(model: nn.Module) -> bool:
    """Make the recurrent layers of `model` follow tries; False if it has none."""
    if not has_recurrence(model):
        return False
    import tree_recurrence

    support = tree_recurrence.install(model)
    if not support.shares_prefixes:
        raise AssertionError(f"check_architecture accepted what tree-recurrence refuses: {support.reason}")
    return True


def unfollow(model: nn.Module) -> None:
    """Undo `follow`."""
    import tree_recurrence

    tree_recurrence.uninstall(model)


def refusal(model: nn.Module) -> str | None:
    """Why the recurrent layers of `model` cannot follow a trie, or None if they can."""
    if not available():
        return "it would mix branches; pip install 'threadweaver[hybrid]' lets some of these models follow tries"
    import tree_recurrence

    support = tree_recurrence.install(model)
    tree_recurrence.uninstall(model)
    if support.shares_prefixes and support.owners:
        return None
    return "tree-recurrence does not know it" if support.shares_prefixes else support.reason.split("; ")[0]


def tree_kwargs(subtree_end: Tensor, depth: Tensor) -> dict[str, Any]:
    """Segments of a packed trie in the form that tree-recurrence reads.

    Args:
        subtree_end: Shape (N,), integers.
        depth: Position ids. Shape (N,), integers.

    Returns:
        tree_cu_seqlens_q: Boundaries of the S segments. Shape (S + 1,), int32, on the device of `subtree_end`.
        tree_segment_parents: Parent segment of each, -1 at a root. Shape (S,), int64, on the CPU.
    """
    ends, depths = torch.stack([subtree_end.long(), depth.long()]).cpu().numpy()
    # A row goes on with its predecessor's segment if it is the predecessor's only child.
    first = np.ones(len(ends), dtype=bool)
    first[1:] = (depths[1:] != depths[:-1] + 1) | (ends[1:] != ends[:-1])
    starts = np.flatnonzero(first)
    parents = np.full(len(starts), -1, dtype=np.int64)
    path: list[int] = []  # segments on the way from the root to the current one
    for segment, start in enumerate(starts.tolist()):
        while path and ends[starts[path[-1]]] <= start:
            path.pop()
        if path:
            parents[segment] = path[-1]
        path.append(segment)
    boundaries = torch.tensor([*starts.tolist(), len(ends)], dtype=torch.int32, device=subtree_end.device)
    return {"tree_cu_seqlens_q": boundaries, "tree_segment_parents": torch.from_numpy(parents)}
