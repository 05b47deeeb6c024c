"""`threadweaver quickstart` end to end on three steps: files, figures, models, exit status, bad rows, failed stages."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tw_core import TAGS
from tw_recipes import cli, data
from tw_recipes.pipelines import quickstart as module
from tw_recipes.pipelines import report
from tw_recipes.pipelines.comparison import Measured, compare


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart")
    words = ["--steps", "3", "--problems", "4", "--seed", "5", "--threads", "1", "--out", str(out)]
    assert cli.main(["quickstart", *words]) == 0
    return out


def test_results_have_the_promised_fields(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"sequential", "forkjoin", "meta"}
    shared = {"accuracy", "tokens", "token_latency"}
    assert shared <= set(results["sequential"])
    gains = {"speedup_tokens", "speedup_wall", "format_correct"}
    assert shared | gains <= set(results["forkjoin"])
    for name, wanted in (("sequential", shared), ("forkjoin", shared | gains)):
        assert all(math.isfinite(results[name][field]) for field in wanted)
        assert results[name]["training"]["steps"] == 3
        assert results[name]["training"]["problems"] == 24
        assert results[name]["problems"] == 4
        assert len(results[name]["training"]["curve"]) == 3
    meta = results["meta"]
    assert (meta["seed"], meta["problems"], meta["skipped_rows"]) == (5, 4, [])
    stages = {"data", "train_start", "train_sequential", "train_forkjoin", "decode_sequential", "decode_forkjoin"}
    assert stages <= set(meta["seconds"])
    assert meta["versions"]["torch"] == torch.__version__
    # 16 problems of the common start and 8 more; 45 + 415 + 1 tokens a sequence.
    assert results["sequential"]["training"]["tokens_trained"] == 24 * 416
    assert results["sequential"]["training"]["tokens_computed"] == 24 * 461
    assert results["forkjoin"]["training"]["tokens_computed"] > results["sequential"]["training"]["tokens_computed"]


def test_three_steps_cannot_multiply(run: Path) -> None:
    # An accuracy that does not come from the responses would show here.
    results = json.loads((run / "results.json").read_text())
    assert results["sequential"]["accuracy"] == results["forkjoin"]["accuracy"] == 0


def test_data_files_read_back_and_do_not_overlap(run: Path) -> None:
    prompts = {}
    for name, count in (("sequential", 24), ("forkjoin", 8), ("test", 4)):
        rows = data.read_rows(run / "data" / f"{name}.jsonl", module.COLUMNS, check=data.fork_join_text).rows
        assert len(rows) == count
        prompts[name] = [row["prompt"] for row in rows]
    assert prompts["forkjoin"] == prompts["sequential"][16:]  # the same problems after the common start
    assert not set(prompts["test"]) & set(prompts["sequential"])


def test_saved_models_load_and_share_the_start(run: Path) -> None:
    weights = {}
    for name in ("start", "sequential", "forkjoin"):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        assert model.config.model_type == "qwen3"
        assert model.config._attn_implementation == "sdpa"
        assert all(len(tokenizer.encode(tag)) == 1 for tag in TAGS)
        assert max(tokenizer.get_vocab().values()) < model.config.vocab_size
        weights[name] = model.lm_head.weight
    for name in ("sequential", "forkjoin"):
        moved = (weights[name] - weights["start"]).abs().max()
        assert 0 < moved < 0.2


def test_report_has_table_plot_and_examples(run: Path) -> None:
    text = (run / "report.md").read_text()
    for words in ("| accuracy on held-out problems | 0.0% (0/4) | 0.0% (0/4) |", "## Seconds", "## An example"):
        assert words in text
    assert (run / "training.png").stat().st_size > 5_000


def test_a_corrupted_row_stops_the_run_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
        rows = list(rows)
        if path.name == "forkjoin.jsonl":
            rows[1] = {**rows[1], "text": rows[1]["text"].replace("</Outlines>", "")}
        return data.write_jsonl(path, rows)

    monkeypatch.setattr(module, "write_jsonl", spoil)
    words = ["--steps", "3", "--problems", "1", "--threads", "1", "--out", str(tmp_path)]
    assert module.main(words) == 1
    message = capsys.readouterr().err
    assert "stage data failed" in message
    assert "forkjoin.jsonl, line 2, column 'text'" in message
    assert not (tmp_path / "results.json").exists()


def test_bad_rows_are_skipped_when_asked_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
        data.write_jsonl(path, rows)
        if path.name == "test.jsonl":
            path.write_text('{"prompt": 7}\n' + path.read_text())
        return path

    monkeypatch.setattr(module, "write_jsonl", spoil)
    words = ["--steps", "3", "--problems", "1", "--threads", "1", "--skip-bad", "--out", str(tmp_path)]
    assert module.main(words) == 0
    skipped = json.loads((tmp_path / "results.json").read_text())["meta"]["skipped_rows"]
    assert len(skipped) == 1
    assert "test.jsonl, line 1, column 'prompt'" in skipped[0]
    assert "Data set rows skipped: 1." in (tmp_path / "report.md").read_text()


def test_a_failed_stage_is_named_and_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(module, "train", fail)
    assert module.main(["--steps", "3", "--out", str(tmp_path)]) == 1
    assert "stage train_start failed: FloatingPointError: the loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--steps", "2"], "steps must be at least 3"), (["--problems", "0"], "problems must be at least 1, got 0")],
)
def test_arguments_out_of_range(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main([*words, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def _measured(correct: list[bool], path: list[int], seconds: float) -> Measured:
    count = len(correct)
    flags, lengths = torch.tensor(correct).numpy(), torch.tensor(path).numpy()
    return Measured(flags, lengths, lengths, flags, {"done": count}, seconds, torch.full((2,), seconds).numpy(), [""])


def test_speedups_are_per_problem_and_the_maximum_is_over_correct_ones() -> None:
    sequential = _measured([True, True, False], [100, 200, 300], 6.0)
    forkjoin = _measured([True, False, True], [50, 50, 200], 4.0)
    found = compare(sequential, forkjoin)
    assert found["forkjoin"]["speedup_tokens"] == pytest.approx((2 + 4 + 1.5) / 3)
    assert found["forkjoin"]["speedup_tokens_max"] == 2
    assert found["forkjoin"]["speedup_wall"] == pytest.approx(1.5)
    assert found["forkjoin"]["format_correct"] == pytest.approx(2 / 3)
    assert found["sequential"]["accuracy"] == pytest.approx(2 / 3)
    none = compare(sequential, _measured([False] * 3, [50, 50, 200], 4.0))
    assert none["forkjoin"]["speedup_tokens_max"] is None


def test_versions_of_a_package_that_runs_from_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        if name == "threadweaver":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(report, "version", missing)
    assert report.versions()["threadweaver"] == "source"
    assert report.versions()["torch"] == "1"
