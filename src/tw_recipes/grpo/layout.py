"""Padded GRPO rows -> token sequences with the places of their log-probs -> packed forwards.

A GRPO row is a prompt and a completion. The completion is a chain, or a tree when `parents` says which token each token
follows (fork/join threads, branching histories of an agent): every path from its root to a leaf is then a sequence of
its own, and a token that several paths share is scored once, by the first of them.

Tests: tests/recipes/grpo/test_logps.py.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tw_core import BudgetError, PackedTrie, ReasoningTrie

NO_TOKEN = -2  # in `completion_parents`: padding
PROMPT = -1  # in `completion_parents`: the last token of the prompt


class ScoredSequences(NamedTuple):
    """S token sequences, and which of their tokens are scored for which place of the (B, C) result.

    Attributes:
        tokens: Prompt and path of each. Shapes (L_s,), int64.
        masks: Which tokens are scored. Shapes (L_s,), bool.
        slots: Index into the flattened (B, C) of each scored token, in order. Shapes (T_s,), int64.
    """

    tokens: list[np.ndarray]
    masks: list[np.ndarray]
    slots: list[np.ndarray]

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences one by one: what a forward without sharing computes."""
        return sum(tokens.size for tokens in self.tokens)


class PackedForward(NamedTuple):
    """One packed row and where its log-probs go.

    Attributes:
        packed: The row.
        targets: Which of its targets. Shape (T,), int64.
        slots: Index into the flattened (B, C). Shape (T,), int64; no index occurs twice in all forwards of a call.
    """

    packed: PackedTrie
    targets: Tensor
    slots: Tensor


def scored_sequences(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    parents: Tensor | None = None,
    generated: Tensor | None = None,
) -> ScoredSequences:
    """Strip the padding of GRPO rows and list their paths.

    Args:
        input_ids: Left-padded prompts and right-padded completions. Shape (B, P + C), integers.
        attention_mask: 0 at padding. Shape (B, P + C).
        completion_length: C.
        parents: For completions that branch: the token that each token follows, as its index in the completion; -1 is
            the last token of the prompt, -2 padding. Parents come first. Shape (B, C), integers.
        generated: 0 at tokens that need no score (tool results, glue). Shape (B, C). None: all do.

    Raises:
        ValueError: A prompt without a token, or parents that are not those of a tree.
    """
    split = input_ids.shape[1] - completion_length
    ids, seen = input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
    scored = seen[:, split:] if generated is None else seen[:, split:] & generated.cpu().numpy().astype(bool)
    trees = None if parents is None else _checked(parents.cpu().numpy(), seen[:, split:])
    found = ScoredSequences([], [], [])
    for row in range(ids.shape[0]):
        unclaimed = scored[row].copy()
        if not unclaimed.any():
            continue
        prompt = ids[row, :split][seen[row, :split]]
        if prompt.size == 0:
            raise ValueError(
                f"prompts must have at least one token, which predicts the completion's first, got none in row {row}; "
                "put a start-of-sequence token before the completion"
            )
        present = np.flatnonzero(seen[row, split:])
        for path in [present] if trees is None else _paths(trees[row], present.size):
            own = unclaimed[path]
            if not own.any():
                continue
            size = int(np.flatnonzero(own)[-1]) + 1  # nothing behind the last scored token matters to it
            path, own = path[:size], own[:size]
            unclaimed[path] = False
            found.tokens.append(np.concatenate([prompt, ids[row, split:][path]]))
            found.masks.append(np.concatenate([np.zeros(prompt.size, dtype=bool), own]))
            found.slots.append(row * completion_length + path[own])
    return found


def _checked(parents: np.ndarray, present: np.ndarray) -> np.ndarray:
    """`parents`, if they are those of trees over the tokens that are present."""
    if parents.shape != present.shape:
        raise ValueError(
            f"completion_parents must have shape (B, C)={present.shape}, that of the completions, got {parents.shape}; "
            "return one parent a token"
        )
    wrong = present & ((parents < PROMPT) | (parents >= np.arange(parents.shape[1])))
    if wrong.any():
        row, token = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"completion_parents[{row}][{token}] must be -1 (the last prompt token) or an earlier token of the "
            f"completion, got {parents[row, token]}; lay tokens out so that parents come first"
        )
    return parents


def _paths(parents: np.ndarray, size: int) -> list[np.ndarray]:
    """Tokens from the root to each leaf of the tree over tokens 0..size-1, leaves ascending; runs are never walked."""
    parents = parents[:size]
    has_child = np.zeros(size + 1, dtype=bool)
    has_child[parents] = True  # the prompt, -1, is the extra last entry
    starts = np.flatnonzero(np.append(True, parents[1:] != np.arange(size - 1)))  # tokens that follow no predecessor
    paths = []
    for leaf in np.flatnonzero(~has_child[:size]).tolist():
        token, runs = leaf, []
        while token >= 0:
            first = int(starts[starts.searchsorted(token, side="right") - 1])
            runs.append(np.arange(first, token + 1))
            token = int(parents[first])
        paths.append(np.concatenate(runs[::-1]))
    return paths


def plan_forwards(sequences: ScoredSequences, max_tokens: int) -> list[PackedForward]:
    """Fold the sequences into tries of at most `max_tokens` rows each.

    All sequences of a call form one trie, so that also what different prompts share (a system prompt) counts once; a
    trie over the budget is cut where least is repeated (`ReasoningTrie.split`).

    Raises:
        BudgetError: One sequence alone is longer than `max_tokens`.
    """
    if not sequences.tokens:
        return []
    longest = max(tokens.size for tokens in sequences.tokens)
    if longest > max_tokens:
        raise BudgetError(
            f"a prompt with its completion has {longest} tokens, more than max_tokens_per_forward={max_tokens}; raise "
            "it to hold the longest"
        )
    forwards = []
    for part in ReasoningTrie.from_sequences(sequences.tokens, sequences.masks).split(max_tokens):
        packed = part.pack()
        slots = np.concatenate([sequences.slots[i] for i in part.origin])
        forwards.append(PackedForward(packed, packed.trained_tokens().targets, torch.from_numpy(slots)))
    return forwards


def idle_forward() -> PackedForward:
    """A forward that scores nothing: for a rank that has fewer rows than another, or a batch without scored tokens."""
    packed = ReasoningTrie.from_sequences([[0, 0]]).pack()
    none = torch.zeros(0, dtype=torch.int64)
    return PackedForward(packed, none, none)
