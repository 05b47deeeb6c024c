"""`threadweaver rollout` and `eval` before they decode: changed inputs, mistyped models, devices that are not there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.rollouts import text_engine
from tw_recipes.cli import main as threadweaver
from tw_recipes.evaluation.command import EvalOptions, run_eval
from tw_recipes.rollout import RolloutFileError
from tw_recipes.rollout_command import EngineOptions, RolloutOptions, run_rollout


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", "answer": "7"}) + "\n" for n in range(2)))
    return path


def changed(path: Path) -> None:
    """Another question of the same length: the number of bytes stays."""
    path.write_text(path.read_text().replace("What is 1?", "What is 5?"))


def as_before_contents_were_compared(settings: Path) -> None:
    kept = json.loads(settings.read_text())
    assert kept.pop("sha256")
    settings.write_text(json.dumps(kept))


def test_a_rollout_of_changed_prompts_is_not_gone_on_with(model, tokenizer, prompts, tmp_path):
    job = RolloutOptions(prompts, tmp_path / "out.jsonl", EngineOptions(str(model)), progress=False)
    assert run_rollout(job, text_engine(tokenizer)).written == 2
    moved = prompts.rename(tmp_path / "moved.jsonl")
    assert run_rollout(replace(job, prompts=moved, samples=2), text_engine(tokenizer)).skipped == 2
    changed(moved)
    with pytest.raises(RolloutFileError, match=r"was made with sha256='[0-9a-f]+', got '[0-9a-f]+'; give the same"):
        run_rollout(replace(job, prompts=moved, samples=3), text_engine(tokenizer))
    as_before_contents_were_compared(tmp_path / "out.jsonl.settings.json")
    assert run_rollout(replace(job, prompts=moved, samples=3), text_engine(tokenizer)).skipped == 4


def test_an_evaluation_of_a_changed_file_is_not_gone_on_with(model, tokenizer, prompts, tmp_path):
    flags = {"question_column": "prompt", "baseline": "sequential", "grader": "exact", "progress": False}
    job = EvalOptions(str(prompts), tmp_path / "out", EngineOptions(str(model)), **flags)
    assert run_eval(job, engine=text_engine(tokenizer)).run.written == 2
    changed(prompts)
    with pytest.raises(RolloutFileError, match=r"trajectories.jsonl was made with sha256="):
        run_eval(job, engine=text_engine(tokenizer))
    as_before_contents_were_compared(tmp_path / "out" / "trajectories.jsonl.settings.json")
    with pytest.raises(RolloutFileError, match=r"baseline.jsonl was made with sha256="):
        run_eval(job, engine=text_engine(tokenizer))
    as_before_contents_were_compared(tmp_path / "out" / "baseline.jsonl.settings.json")
    assert run_eval(job, engine=text_engine(tokenizer)).run.skipped == 2


@pytest.mark.parametrize("device", ["cuda:99" if torch.cuda.is_available() else "cuda", "gpu"])
def test_a_device_that_is_not_there_is_an_error_line(model, prompts, tmp_path, capsys, device):
    flags = ["rollout", str(prompts), "--model", str(model), "--out", str(tmp_path / "o.jsonl"), "--device", device]
    assert threadweaver(flags) == 1
    assert f"device must be one that torch can use here, got '{device}'" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()


def test_a_mistyped_model_folder_is_not_looked_for_on_the_hub(prompts, tmp_path, capsys):
    flags = [str(prompts), "--out", str(tmp_path / "o")]
    for command, more in (("rollout", []), ("eval", ["--question-column", "prompt"])):
        assert threadweaver([command, *flags, *more, "--model", str(tmp_path / "sfft")]) == 1
        assert "model must be a local folder or a name on the Hub, got" in capsys.readouterr().err


def test_a_missing_id_column_names_the_row_from_one(model, prompts, tmp_path):
    job = RolloutOptions(prompts, tmp_path / "o.jsonl", EngineOptions(str(model)), id_column="name", progress=False)
    with pytest.raises(ValueError, match=r"prompts.jsonl, row 1 has no column 'name'"):
        run_rollout(job)
