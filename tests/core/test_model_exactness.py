"""A tiny random Qwen3 in float64: loss and every gradient of a packed trie equal those of its units one by one."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3 import modeling_qwen3

from tests.support.models import tiny_model
from tests.support.sequences import sequence_sets
from tests.support.trajectories import simulated
from tests.support.tries import gradients, largest_error
from tw_core import PackedTrie, ReasoningTrie, masks

Units = list[tuple[list[int], list[int]]]


class _DoubleTorch:
    """torch without float32: norms and softmax of the model ask for it by name, which rounds float64 runs to 1e-7."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, "float64" if name == "float32" else name)


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    model = tiny_model("qwen3", dtype=torch.float64, vocab_size=128, pad_token_id=None, attn_implementation="eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3, "torch", _DoubleTorch())
        yield model


def packed_loss(model: PreTrainedModel, row: PackedTrie) -> Tensor:
    """Summed loss of a packed row: dense additive mask, positions = depth, weighted edges."""
    logits = model(
        input_ids=row.input_ids[None],
        position_ids=row.position_ids[None],
        attention_mask=masks.additive_mask(row.subtree_end, torch.float64),
        use_cache=False,
    ).logits[0]
    logps = logits[row.target_rows].log_softmax(-1).gather(1, row.target_ids[:, None])[:, 0]
    return -(row.target_weights * logps).sum()


def expanded_loss(model: PreTrainedModel, sequences: Iterable[list[int]], masks: Iterable[list[bool]]) -> Tensor:
    """Summed loss of the sequences, one plain causal forward each."""
    total = torch.zeros((), dtype=torch.float64)
    for sequence, mask in zip(sequences, masks, strict=True):
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1]
        losses = -logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:]).long()[:, None])[:, 0]
        total = total + (losses * torch.tensor(mask[1:], dtype=torch.float64)).sum()
    return total


def assert_equal(model: PreTrainedModel, found: Tensor, expected: Tensor, tolerance: float) -> None:
    loss = float(expected.detach())
    assert float(found.detach()) == pytest.approx(loss, rel=tolerance, abs=0.0)
    reference = gradients(model, expected)
    assert largest_error(gradients(model, found), reference) <= tolerance


def as_masks(units: Units) -> tuple[list[list[int]], list[list[bool]]]:
    return [a + b for a, b in units], [[False] * len(a) + [True] * len(b) for a, b in units]


trained = simulated().map(lambda played: played.units).filter(lambda u: any(b and len(a) + len(b) > 1 for a, b in u))


@settings(max_examples=20)
@given(trained)
def test_a_packed_trajectory_equals_its_units(model: PreTrainedModel, units: Units) -> None:
    sequences, loss_masks = as_masks(units)
    row = ReasoningTrie.from_units(units).pack()
    assert_equal(model, packed_loss(model, row), expanded_loss(model, sequences, loss_masks), 1e-9)


@settings(max_examples=15)
@given(sequence_sets(most=6), st.integers(0, 4))
def test_duplicates_and_prefixes_weigh_as_often_as_they_stand_there(
    model: PreTrainedModel, sequences: list[list[int]], padding: int
) -> None:
    """All tokens trained, also in a padded forest of two copies."""
    sequences = [*sequences, [0, 1]]
    everything = [[True] * len(sequence) for sequence in sequences]
    row = ReasoningTrie.from_sequences(sequences).pack()
    forest = PackedTrie.concat([row, row]).pad_to(2 * row.num_rows + padding)
    expected = expanded_loss(model, sequences, everything)
    assert_equal(model, packed_loss(model, row), expected, 1e-9)
    assert_equal(model, packed_loss(model, forest) / 2, expanded_loss(model, sequences, everything), 1e-9)


@settings(max_examples=15)
@given(trained, st.integers(0, 30))
def test_split_tries_sum_to_the_loss_of_the_whole(model: PreTrainedModel, units: Units, spare: int) -> None:
    trie = ReasoningTrie.from_units(units)
    parts = trie.split(max(len(a) + len(b) for a, b in units) + spare)
    found = sum((packed_loss(model, part.pack()) for part in parts), torch.zeros((), dtype=torch.float64))
    assert_equal(model, found, packed_loss(model, trie.pack()), 1e-6)


def test_advantages_of_sequences_reach_shared_tokens(model: PreTrainedModel) -> None:
    """`trained_tokens` lets each sequence weigh a shared token in its own way."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 128, 6).tolist()
    sequences = [shared + rng.integers(0, 128, n).tolist() for n in (3, 5, 1)]
    advantages = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    row = ReasoningTrie.from_sequences(sequences, [[n >= 3 for n in range(len(s))] for s in sequences]).pack()
    logits = model(
        input_ids=row.input_ids[None],
        position_ids=row.position_ids[None],
        attention_mask=masks.additive_mask(row.subtree_end, torch.float64),
        use_cache=False,
    ).logits[0]
    logps = logits[row.target_rows].log_softmax(-1).gather(1, row.target_ids[:, None])[:, 0]
    tokens = row.trained_tokens()
    found = -(advantages[tokens.sequences] * logps[tokens.targets]).sum()
    expected: Any = sum(
        a * expanded_loss(model, [s], [[n >= 3 for n in range(len(s))]])
        for a, s in zip(advantages, sequences, strict=True)
    )
    assert_equal(model, found, expected, 1e-9)
