"""Training that is stopped and goes on ends with the weights and the curve of one that was not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tw_recipes.pipelines.checkpoints import Checkpoints, OutOfTime
from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.training import Trained, train
from tw_recipes.tasks import SumOfProducts
from tw_recipes.tasks.model import tiny_model

TASK = SumOfProducts(2)
TOKENIZER = TASK.tokenizer()
ROWS = [{"prompt": row["prompt"], "text": row["text"]} for row in TASK.rows(8, seed=0)]


def _train(model: Any, folder: Path, **options: Any) -> Trained:
    checkpoints = Checkpoints(folder, **options)
    return quietly(train)(model, TOKENIZER, ROWS, tries=True, folder=folder, seed=0, batch=2, checkpoints=checkpoints)


def _model() -> Any:
    return tiny_model(TOKENIZER, hidden_size=16, layers=1, heads=2)


def test_stopped_at_every_step(tmp_path: Path) -> None:
    whole, pieces = _model(), _model()
    done = _train(whole, tmp_path / "whole")
    for step in (1, 2, 3):
        pieces = _model()  # a new process has the weights of the checkpoint alone
        with pytest.raises(OutOfTime, match=f"used up at step {step}; run the same command again"):
            _train(pieces, tmp_path / "pieces", deadline=0.0)
        assert [path.name for path in (tmp_path / "pieces").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    pieces = _model()
    again = _train(pieces, tmp_path / "pieces", deadline=0.0)  # the last step needs no stop
    assert again.steps == done.steps == 4
    assert [entry[0] for entry in again.curve] == [entry[0] for entry in done.curve] == [1, 2, 3, 4]
    np.testing.assert_allclose(again.curve, done.curve, atol=1e-5)
    for one, two in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert not list(tmp_path.rglob("checkpoint-*"))  # nothing is left of a training that is done


def test_checkpoints_come_by_the_clock(tmp_path: Path) -> None:
    found: list[list[str]] = []

    class Watch(Checkpoints):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            found.append([path.name for path in self.folder.glob("checkpoint-*")])

    checkpoints = Watch(tmp_path, every=0.0)
    quietly(train)(_model(), TOKENIZER, ROWS, tries=True, folder=tmp_path, seed=0, batch=2, checkpoints=checkpoints)
    assert found == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert Checkpoints(tmp_path).last is None
