"""A float32 model decodes in float32, also inside a trainer that computes in half precision.

accelerate wraps the forward of a model that it prepares for mixed precision in autocast. Caches of keys and values have
the weights' dtype, and autocast hands them half of their entries in another one.
Tests: tests/recipes/grpo/test_pgrpo_trainer.py, test_pgrpo_gpu.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """A float32 model in a block as it was before its forward was wrapped; others as they are."""
    plain = getattr(model, "_original_forward", None)
    if plain is None or model.dtype != torch.float32:
        yield
        return
    wrapped, model.forward = model.forward, plain
    try:
        yield
    finally:
        model.forward = wrapped
