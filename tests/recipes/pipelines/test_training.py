"""Training with compiled layers takes the steps of eager ones and leaves the model as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.training import Trained, train
from tw_recipes.tasks import SumOfProducts
from tw_recipes.tasks.model import tiny_model

TASK = SumOfProducts(2)
TOKENIZER = TASK.tokenizer()
ROWS = [{"prompt": row["prompt"], "text": row["text"]} for row in TASK.rows(8, seed=0)]


def _train(folder: Path, compiled: bool) -> tuple[Any, Trained]:
    model = tiny_model(TOKENIZER, hidden_size=16, layers=2, heads=2)
    done = quietly(train)(model, TOKENIZER, ROWS, tries=False, folder=folder, seed=0, batch=2, compiled=compiled)
    return model, done


def test_compiled_layers_take_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with, compiled = torch.nn.Module.compile, []

    def without_inductor(module: torch.nn.Module, **options: Any) -> None:
        compiled.append(options)
        compile_with(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)
    torch._dynamo.reset()
    eager, expected = _train(tmp_path / "eager", compiled=False)
    assert not compiled
    model, found = _train(tmp_path / "compiled", compiled=True)
    assert compiled == [{"dynamic": True}] * 2
    np.testing.assert_allclose(found.curve, expected.curve, rtol=1e-4)
    for one, two in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)
    assert all(module._compiled_call_impl is None for module in model.modules())
