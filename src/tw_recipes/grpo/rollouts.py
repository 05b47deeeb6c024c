"""A rollout as one GRPO row: its own trie in preorder, the last row being the end of the joined response.

    units ──ReasoningTrie──► rows below the prompt: completion_ids, parents, mask (generated tokens), sampler log-probs

Side branches (threads 2..n) stand before the path that goes on, so the last row is the last token of the response and
TRL's reading of it (a stop id there means "not truncated") is right. Injected glue and the joined copies of threads are
rows without loss. Everything of one trajectory is one row of the batch: it has one advantage, and weighs once in the
mean of its group. Tests: tests/recipes/grpo/test_pgrpo_rollouts.py. Source: SPEC sections 2, 3 and 6.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tw_core import ReasoningTrie
from tw_recipes.decoding.rollout import Rollout


class RolloutRow(NamedTuple):
    """One row of a GRPO batch.

    Attributes:
        completion_ids: Tokens below the prompt, in preorder. C >= 1.
        parents: Place of each token's parent in the row, -1 for the last token of the prompt. Shape (C,).
        mask: 1 where the policy wrote the token. Shape (C,).
        logprobs: Log-probs of the sampler, 0 where the mask is; None if the engine gave none. Shape (C,).
    """

    completion_ids: list[int]
    parents: list[int]
    mask: list[int]
    logprobs: list[float] | None


def rollout_row(rollout: Rollout, stop_ids: Sequence[int]) -> RolloutRow:
    """The row of one rollout.

    Args:
        rollout: What a decoder returned.
        stop_ids: End-of-sequence ids of the trainer (TRL also counts the padding id). A rollout that did not end by
            itself never ends in one of them.

    Returns:
        The row; a rollout that wrote nothing is one padding token (`stop_ids[0]`) without loss.
    """
    units, prompt = rollout.units, rollout.prompt_length
    if not units:
        return RolloutRow([int(stop_ids[0])], [-1], [0], [0.0])
    sequences = [np.concatenate([unit.context, unit.completion]) for unit in units]
    spans = [(len(unit.context), len(unit.context) + len(unit.completion)) for unit in units]
    # The path that goes on ends with the last call of the top level.
    last = max(place for place, call in enumerate(rollout.written) if not call.path)
    order = _sides_first(sequences, sequences[last])
    trie = ReasoningTrie([sequences[place] for place in order], [spans[place] for place in order])
    if not rollout.ok and int(trie.input_ids[-1]) in stop_ids:
        # A thread ended in a stop id and no call follows: the path is that of the joined ids, closers included.
        order = _sides_first(sequences, rollout.ids)
        trie = ReasoningTrie(
            [*(sequences[place] for place in order), rollout.ids], [*(spans[place] for place in order), (0, 0)]
        )
    logprobs, given = np.zeros(trie.num_tokens), rollout.logprobs
    if given is not None:
        for number, place in enumerate(order):
            logprobs[trie.sequence_rows(number)[spans[place][0] :]] = given[place]
    parents = np.maximum(trie.parent[prompt:] - prompt, -1)
    return RolloutRow(
        trie.input_ids[prompt:].tolist(),
        parents.tolist(),
        (trie.weights[prompt:] > 0).astype(int).tolist(),
        None if given is None else logprobs[prompt:].tolist(),
    )


def _sides_first(sequences: Sequence[np.ndarray], path: np.ndarray) -> list[int]:
    """An order of insertion in which, at each branch of `path`, the sides come before the path itself.

    That is: who leaves the path earlier is inserted earlier. The sequence that is the path, if any, comes last.
    """
    return sorted(range(len(sequences)), key=lambda place: _shared(sequences[place], path))


def _shared(one: np.ndarray, path: np.ndarray) -> tuple[int, bool]:
    """Length of the common prefix, and whether that is all of `one`."""
    size = min(one.size, path.size)
    differs = one[:size] != path[:size]
    length = int(differs.argmax()) if differs.any() else size
    return length, length == one.size
