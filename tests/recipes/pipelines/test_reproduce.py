"""`threadweaver reproduce` end to end with a model of one layer: stages, files, report, going on, the run repeated."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.bench_reproduce import over_seeds, records
from transformers import AutoModelForCausalLM

from benchmarks import bench_reproduce
from tw_recipes import cli
from tw_recipes.pipelines.checkpoints import Checkpoints, OutOfTime
from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.reproduce import command, reinforcement, report
from tw_recipes.pipelines.reproduce.settings import (
    PRESETS,
    Evaluation,
    ModelSize,
    Reinforcement,
    SelfTraining,
    Settings,
    Training,
)
from tw_recipes.pipelines.reproduce.sides import Worker
from tw_recipes.pipelines.reproduce.stages import StageError, Stages
from tw_recipes.rollout import read_trajectories
from tw_recipes.tasks.model import tiny_model

TINY = Settings(
    threads=1,
    at_once=False,
    model=ModelSize(hidden_size=16, layers=1, heads=2, context=700),
    training=Training(batch=4, start_steps=1, steps=2, retained_share=0.0, mixed_steps=1),
    self_training=SelfTraining(rounds=1, prompts=2, steps=1),
    reinforcement=Reinforcement(steps=1, prompts=2, generations=2),
    evaluation=Evaluation(problems=3, batches=(1, 2), timed=1),
)
REPRODUCE = quietly(command.reproduce)  # the command's own way: libraries' warnings are off
STAGES = ("sft", "mixed", "self_training_1", "rl")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reproduce")
    REPRODUCE(TINY, out)
    return out


def test_results_have_every_stage_of_both_sides(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert Settings.from_json(results["settings"]) == TINY
    for side in ("sequential", "forkjoin"):
        stages = results["sides"][side]["stages"]
        assert [stage["name"] for stage in stages] == list(STAGES)
        assert [stages[i]["training"]["steps"] for i in (0, 1, 3)] == [2, 1, 1]
        assert {stage["problems"] for stage in stages} == {3}
        assert set(results["sides"][side]["seconds_per_problem"]) == {"1", "2"}
    assert len(results["speedup"]["per_problem"]) == 3
    assert set(results["speedup"]["wall"]) == {"1", "2"}
    assert results["start"]["steps"] == 1
    training = [results["sides"][side]["stages"][0]["training"] for side in ("sequential", "forkjoin")]
    assert training[0]["tokens"] == 8 * 461  # the problems of the same two steps: prompt, solution, end
    assert training[1]["tokens"] > training[0]["tokens"]


def test_stages_leave_models_and_trajectories(run: Path) -> None:
    folders = {folder.name.rsplit("-", 1)[0]: folder for folder in (run / "stages").iterdir()}
    assert len(folders) == 1 + 2 * (2 * 4 + 1)
    weights = {}
    for name in ("start", "sequential-sft", "forkjoin-sft", "forkjoin-rl"):
        model = AutoModelForCausalLM.from_pretrained(folders[name] / "model")
        weights[name] = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weights["start"], weights["forkjoin-sft"])
    assert not torch.equal(weights["sequential-sft"], weights["forkjoin-sft"])
    assert len(list(read_trajectories(folders["forkjoin-rl-evaluation"] / "trajectories.jsonl"))) == 3
    assert sum(1 for _ in (folders["forkjoin-rl"] / "trainer" / "rollouts").iterdir()) >= 1
    assert not list(run.rglob("checkpoint-*"))


def test_report_has_its_parts(run: Path) -> None:
    text = (run / "report.md").read_text()
    for words in (
        "| accuracy on held-out problems |",
        "| problems in flight | sequential | fork/join | speedup |",
        "| fork/join | self_training_1 |",
        "| published: public reproduction",
        "What differs from the published runs:",
        "Changed from the method: none",
    ):
        assert words in text
    html = (run / "report.html").read_text()
    assert html.count("<svg") == 5
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    for plot in ("accuracy_latency", "training", "reinforcement", "speedup", "wall_clock"):
        assert (run / f"{plot}.png").stat().st_size > 5_000
    assert (run / "examples.html").read_text().count("<details") == 6


def test_a_run_that_read_no_clock_reports_none(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    titles = [title for title, _, _ in report.sections(results)]
    for side in results["sides"].values():
        side["seconds_per_problem"] = {}
    results["speedup"]["wall"] = {}
    assert [title for title, _, _ in report.sections(results)] == [t for t in titles if t != "Wall clock per problem"]


def test_bench_records_hold_each_stage_and_the_spread_over_seeds(run: Path) -> None:
    one = records(json.loads((run / "results.json").read_text()), "seed_0")
    assert {row["impl"] for row in one} == {
        *("sequential", "forkjoin", "both"),
        *(f"{side}_{stage}" for side in ("sequential", "forkjoin") for stage in STAGES),
    }
    found = {(row["impl"], row["metric"]) for row in one}
    assert len(found) == len(one)
    assert {("forkjoin", "speedup_tokens"), ("forkjoin", "speedup_wall_1"), ("sequential", "accuracy")} <= found
    two = [{**row, "case": "seed_1", "value": row["value"] + 2} for row in one]
    other = {**one[0], "case": "rho_0_seed_3", "value": 7.0}
    means = over_seeds([*one, *two, other])
    assert len(means) == 2 * len(one) + 2
    for row in means:
        before = next(r["value"] for r in one if (r["impl"], r["metric"]) == (row["impl"], row["metric"]))
        expected = {"mean": before + 1, "spread": 2, "rho_0_mean": 7.0, "rho_0_spread": 0.0}
        assert row["value"] == pytest.approx(expected[row["case"]])


def test_a_second_run_makes_nothing_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.rglob("stage.json")}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished run trains nothing")

    monkeypatch.setattr("tw_recipes.pipelines.reproduce.sides.train", fail)
    monkeypatch.setattr("tw_recipes.pipelines.reproduce.sides.measure.decode", fail)
    REPRODUCE(TINY, run)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("stage.json")} == before


@pytest.mark.parametrize("change", [{"rho": 0.0}, {"std_normalisation": True}], ids=str)
def test_an_ablation_shares_what_it_does_not_change(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    changed = replace(TINY, reinforcement=replace(TINY.reinforcement, **change))
    made: list[bool] = []

    def stop(*args: Any, forking: bool, **kwargs: Any) -> None:
        made.append(forking)
        raise ArithmeticError("far enough")

    monkeypatch.setattr("tw_recipes.pipelines.reproduce.sides.grpo_trainer", stop)
    with pytest.raises(StageError, match="stage forkjoin-rl failed: ArithmeticError: far enough"):
        REPRODUCE(changed, run)
    assert made == [True]  # both are ablations of P-GRPO; nothing before changed, and nothing of the sequential side


def test_stages_between_are_graded_on_fewer_problems_and_clocks_can_be_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Stages, "_make", _unless_trained(Stages._make))
    changed = replace(TINY, evaluation=replace(TINY.evaluation, between=2, batches=()))
    results = REPRODUCE(changed, run)
    for side in ("sequential", "forkjoin"):
        assert [stage["problems"] for stage in results["sides"][side]["stages"]] == [3, 2, 2, 3]
        assert results["sides"][side]["seconds_per_problem"] == {}
    assert len(results["speedup"]["per_problem"]) == 3
    assert results["speedup"]["wall"] == {}


def _unless_trained(make: Any) -> Any:
    def only(self: Any, name: str, *args: Any) -> Any:
        assert name.endswith(("-evaluation", "-wall_clock")), f"{name} is there already"
        return make(self, name, *args)

    return only


def test_bench_writes_what_is_finished_when_its_time_is_used_up(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = (run / "results.json").read_text()

    def reproduce(settings: Settings, out: Path, *, minutes: float | None = None) -> None:
        assert minutes is not None
        assert minutes <= 5
        if settings.training.leaky_loss:
            raise OutOfTime("the time is used up at step 7")
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(finished)

    monkeypatch.setattr(command, "reproduce", reproduce)
    words = ["--seeds", "0", "--ablations", "std_normalisation", "leaky_loss_sft", "--minutes", "5", "--rounds", "0"]
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["bench", *words, "--out", str(tmp_path / "out"), "--results", str(file)])
    assert bench_reproduce.main() == 3
    found = json.loads(file.read_text())
    cases = {row["case"] for row in found["records"]}
    assert cases == {f"{name}{case}" for name in ("", "std_normalisation_") for case in ("seed_0", "mean", "spread")}
    assert found["meta"]["command"].endswith("--seeds 0 --scale 1.0 --rounds 0 --ablations std_normalisation")
    monkeypatch.setattr(command, "reproduce", lambda *args, **kwargs: _raise(OutOfTime("before the first")))
    file.unlink()
    assert bench_reproduce.main() == 3
    assert not file.exists()


def test_bench_at_once_and_ablations_alone_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings_of(preset: str, *, seed: int, leaky_loss: bool = False, **others: Any) -> Settings:
        settings = replace(TINY, seed=seed, self_training=replace(TINY.self_training, rounds=0))
        training = replace(settings.training, mixed_steps=0, leaky_loss=leaky_loss)
        evaluation = replace(TINY.evaluation, problems=2, batches=())
        return replace(
            settings, training=training, evaluation=evaluation, reinforcement=replace(TINY.reinforcement, steps=0)
        )

    monkeypatch.setattr(command, "settings_of", settings_of)
    file = tmp_path / "found.json"

    def bench(*words: str) -> set[str]:
        monkeypatch.setattr(sys, "argv", ["bench", *words, "--out", str(tmp_path / "out"), "--results", str(file)])
        assert bench_reproduce.main() == 0
        return {row["case"] for row in json.loads(file.read_text())["records"]}

    assert bench("--seeds", "0", "1", "--at-once") == {"seed_0", "seed_1", "mean", "spread"}
    stages = {folder.name.rsplit("-", 1)[0] for folder in (tmp_path / "out" / "1" / "stages").iterdir()}
    assert {"start", "sequential-sft", "forkjoin-sft", "forkjoin-sft-evaluation"} <= stages
    before = json.loads(file.read_text())["records"]
    leaky = {f"leaky_loss_sft_{case}" for case in ("seed_0", "mean", "spread")}
    words = ["--seeds", "0", "--only-ablations", "--ablations", "leaky_loss_sft", "--merge", str(file)]
    assert bench(*words) == {"seed_0", "seed_1", "mean", "spread", *leaky}
    after = json.loads(file.read_text())["records"]
    assert [row for row in after if not row["case"].startswith("leaky")] == before
    assert {row["impl"] for row in after if row["case"].startswith("leaky")} == {"forkjoin", "forkjoin_sft"}
    with pytest.raises(SystemExit):
        bench("--only-ablations")


def _raise(error: Exception) -> None:
    raise error


def test_time_that_is_used_up_ends_with_its_own_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", "--out", str(tmp_path), "--minutes", "0", "--scale", "0.001", "--threads", "1"]
    assert cli.main(words) == 3
    assert "the time is used up before the stage start; run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "3"], "rounds must be 0, 1 or 2, got 3"),
        (["--nested"], "nested=True needs the task multiply"),
        (["--task", "sums"], "task must be one of products, multiply, adaptive, got 'sums'"),
    ],
)
def test_flags_out_of_range(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--out", str(tmp_path), *words]) == 1
    assert message in capsys.readouterr().err


def test_the_gpu_presets_model_is_within_the_announced_size() -> None:
    preset = PRESETS["h100"]
    tokenizer = preset.make_task().tokenizer()
    with torch.device("meta"):
        parameters = tiny_model(tokenizer, **vars(preset.model)).num_parameters()
    assert 20e6 < parameters < 150e6
    longest = max(len(tokenizer.encode(row["text"])) for row in preset.make_task().rows(40, seed=0))
    assert 1.2 * longest < preset.model.context


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])  # a GPU has one for each prompt
def test_a_run_that_is_stopped_in_every_step_ends_with_the_same_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int
) -> None:
    monkeypatch.setattr(reinforcement, "micro_batches_of", lambda settings: micro_batches)
    settings = replace(TINY, reinforcement=replace(TINY.reinforcement, steps=2))
    REPRODUCE(settings, tmp_path / "whole")
    stops = 0
    # Stages start, but training finds that its time is used up: every run makes one step.
    monkeypatch.setattr(Stages, "checkpoints", lambda self, folder: Checkpoints(folder, deadline=0.0))
    for _ in range(20):
        try:
            quietly(Worker(settings, tmp_path / "pieces").side)("forkjoin")
            break
        except OutOfTime:
            stops += 1
    assert stops >= 2  # one in sft, one in reinforcement learning at least
    for name in ("forkjoin-sft", "forkjoin-rl"):
        weights = [
            AutoModelForCausalLM.from_pretrained(next((tmp_path / kind / "stages").glob(f"{name}-????????")) / "model")
            for kind in ("whole", "pieces")
        ]
        for one, two in zip(*(model.parameters() for model in weights), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_one_side_after_the_other_or_both_at_once(run: Path, tmp_path: Path) -> None:
    REPRODUCE(replace(TINY, at_once=True), tmp_path)
    one, two = (json.loads((out / "results.json").read_text()) for out in (run, tmp_path))
    assert report.summary_rows(one) == report.summary_rows(two)

    def figures(out: Path) -> dict[str, Any]:
        return {
            file.parent.name: json.loads(file.read_text())["figures"]
            for file in out.rglob("stage.json")
            if "wall_clock" not in file.parent.name
        }

    assert figures(run) == figures(tmp_path)
    texts = [
        {f.parent.name: sorted(row["text"] for row in read_trajectories(f)) for f in out.rglob("trajectories.jsonl")}
        for out in (run, tmp_path)
    ]
    assert texts[0] == texts[1]
