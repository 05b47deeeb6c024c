"""Small random data for recipe tests: units with shared contexts, and the two ways to run them through a model."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import VOCAB
from tw_recipes.sft.collator import TrieCollator


def random_units(rng: random.Random, count: int, *, longest: int = 8) -> list[list[list[int]]]:
    """`count` [context, completion] pairs of one trajectory: contexts grow, and completions branch off them."""

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(4, VOCAB) for _ in range(rng.randint(low, high))]

    context, units = tokens(3, longest), []
    for _ in range(count):
        completion = tokens(2, longest)
        units.append([list(context), completion])
        if rng.random() < 0.5:
            context = context + completion + tokens(0, 2)
    return units


def packed_loss(model: nn.Module, units: list[list[list[int]]], **options: Any) -> Tensor:
    """Summed loss of the units as one trie, through an installed model."""
    batch = TrieCollator()([{"units": units}])
    batch.pop("labels")
    labels = batch.pop("shift_labels")
    logits = model(**batch, use_cache=False, **options).logits
    return nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")


def expanded_loss(model: nn.Module, units: list[list[list[int]]]) -> Tensor:
    """Summed completion loss of the units, one stock forward each."""
    total = torch.zeros(())
    for context, completion in units:
        ids = torch.tensor([context + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
        total = total + nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum")
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of each parameter that the loss reaches."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error over named tensors; each is compared by norm, against a floor of 1e-3 of the largest."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(tensor.norm()) for tensor in expected.values())
    return max(
        float((found[name] - tensor).norm()) / max(float(tensor.norm()), floor) for name, tensor in expected.items()
    )
