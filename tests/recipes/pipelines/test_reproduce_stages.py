"""Stages of `reproduce`: done once, gone on with after a kill, remade when settings change; rows."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from tests.support.arithmetic import holds_true_equations
from tw_core import ReasoningTrie
from tw_recipes.pipelines import training
from tw_recipes.pipelines.checkpoints import OutOfTime
from tw_recipes.pipelines.reproduce import rows
from tw_recipes.pipelines.reproduce.command import settings_of
from tw_recipes.pipelines.reproduce.settings import PRESETS, Settings, Training, fingerprint
from tw_recipes.pipelines.reproduce.stages import Stage, StageError, Stages, seconds_in
from tw_recipes.sft.collator import PACKED_COLUMNS
from tw_recipes.sft.data import prepare_dataset
from tw_recipes.sft.rows import row_to_trie
from tw_recipes.tasks import get_task


def test_a_stage_is_made_once_and_again_for_other_settings(tmp_path: Path) -> None:
    calls: list[Path] = []

    def work(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return {"value": len(calls)}

    first = Stages(tmp_path).run("sft", {"seed": 0}, work)
    again = Stages(tmp_path).run("sft", {"seed": 0}, work)
    other = Stages(tmp_path).run("sft", {"seed": 1}, work)
    assert (first.figures, again.figures, other.figures) == ({"value": 1}, {"value": 1}, {"value": 2})
    assert first == again
    assert first.folder != other.folder
    assert json.loads((first.folder / "stage.json").read_text())["depends_on"] == {"seed": 0}


def test_a_stage_that_another_works_at_is_waited_for(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(60)
        return {"made": "there"}

    with ThreadPoolExecutor(2) as pool:
        there = pool.submit(Stages(tmp_path).run, "sft", {}, slow)
        assert begun.wait(60)
        here = pool.submit(Stages(tmp_path).run, "sft", {}, lambda folder: {"made": "here"})
        with pytest.raises(TimeoutError):
            here.result(0.1)
        go_on.set()
        assert here.result(60) == there.result(60)
    assert here.result().figures == {"made": "there"}


def test_seconds_in_which_a_stage_was_made_count_once() -> None:
    spans = [(10.0, 5.0), (12.0, 1.0), (14.0, 4.0), (100.0, 2.0)]
    assert seconds_in(Stage("", "", Path(), {}, began, seconds, 0.0) for began, seconds in spans) == 10.0
    assert seconds_in([]) == 0.0


def test_a_stage_that_was_killed_is_made_again_in_its_folder(tmp_path: Path) -> None:
    def dies(folder: Path) -> dict[str, Any]:
        (folder / "trajectories.jsonl").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("decode", {}, dies)
    done = Stages(tmp_path).run("decode", {}, lambda folder: {"found": (folder / "trajectories.jsonl").read_text()})
    assert done.figures == {"found": "half"}


def test_a_failure_names_the_stage_and_leaves_it_undone(tmp_path: Path) -> None:
    def fails(folder: Path) -> dict[str, Any]:
        raise FloatingPointError("the loss is not finite")

    with pytest.raises(StageError, match="stage rl failed: FloatingPointError: the loss is not finite"):
        Stages(tmp_path).run("rl", {}, fails)
    assert not list(tmp_path.rglob("stage.json"))


def test_figures_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Stages(tmp_path).run("sft", {}, lambda folder: {"loss": float("nan")})
    assert not list(tmp_path.rglob("stage.json"))


def test_time_stops_before_a_stage_but_not_before_one_that_is_done(tmp_path: Path) -> None:
    Stages(tmp_path).run("sft", {}, lambda folder: {})
    late = Stages(tmp_path, minutes=-1)
    assert late.run("sft", {}, lambda folder: {}).figures == {}
    with pytest.raises(OutOfTime, match="before the stage rl; run the same command again"):
        late.run("rl", {}, lambda folder: {})


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_json(preset: str) -> None:
    settings = replace(PRESETS[preset], seed=3)
    assert Settings.from_json(json.loads(json.dumps(settings.as_json()))) == settings


def test_none_stays_none_at_any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    without_start = replace(PRESETS["cpu"], training=replace(PRESETS["cpu"].training, start_steps=0))
    monkeypatch.setitem(PRESETS, "cpu", without_start)
    assert settings_of("cpu", scale=0.001).training.start_steps == 0


def test_the_mixed_stage_is_for_what_follows_it() -> None:
    assert settings_of("h100").mixes
    assert settings_of("h100", rounds=0).mixes
    assert settings_of("h100", rl_steps=0).mixes
    assert not settings_of("h100", rounds=0, rl_steps=0).mixes


def test_one_flag_an_ablation() -> None:
    base = settings_of("cpu")
    assert base == PRESETS["cpu"]
    changed = {
        "std_normalisation": settings_of("cpu", std_normalisation=True).reinforcement.std_normalisation,
        "leaky": settings_of("cpu", leaky_loss=True).training.leaky_loss,
        "rho": settings_of("cpu", rho=0.0).reinforcement.rho,
        "rounds": settings_of("cpu", rounds=2).self_training.rounds,
        "nested": settings_of("h100", nested=True).nested,
    }
    assert changed == {"std_normalisation": True, "leaky": True, "rho": 0.0, "rounds": 2, "nested": True}
    small = settings_of("cpu", scale=0.001)
    assert (small.training.start_steps, small.training.steps, small.evaluation.problems) == (1, 1, 4)
    assert settings_of("cpu", rl_steps=0).reinforcement.steps == 0
    assert settings_of("cpu", steps=7, scale=0.5).training.steps == 7
    assert settings_of("cpu", compiled=True).training.compiled
    for words, message in (
        ({"rounds": 3}, "rounds must be 0, 1 or 2, got 3"),
        ({"nested": True}, "nested=True needs the task multiply, got 'products'"),
        ({"scale": 0}, "scale must be in"),
        ({"rl_steps": -1}, "rl_steps must be at least 0, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"mixed_steps": -1}, "mixed_steps must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of("cpu", **words)
    with pytest.raises(ValueError, match="preset must be one of cpu, h100, got 'tpu'"):
        settings_of("tpu")
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_sides_have_the_same_problems_and_uses_do_not_overlap() -> None:
    settings = replace(PRESETS["cpu"], training=Training(batch=8, start_steps=4, steps=30))
    plain = rows.training_rows(settings, "sequential", first=4, steps=30)
    mixed = rows.training_rows(settings, "forkjoin", first=4, steps=30, sequential_share=0.3)
    assert rows.training_rows(settings, "forkjoin", first=4, steps=2) == settings.make_task().rows(
        16, seed=0, offset=32
    )
    assert [row["prompt"] for row in plain] == [row["prompt"] for row in mixed]
    assert not any("<Parallel>" in row["text"] for row in plain)
    assert 0.6 < sum("<Parallel>" in row["text"] for row in mixed) / 240 < 0.8
    start = rows.training_rows(settings, "sequential", first=0, steps=4)
    uses = [start, plain, *(rows.self_training_problems(settings, r) for r in (0, 1))]
    uses += [rows.reinforcement_problems(settings), rows.held_out_problems(settings)]
    prompts = [{row["prompt"] for row in use} for use in uses]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == sum(map(len, uses))


def test_cycled_rows_come_equally_often_in_an_order_of_the_seed() -> None:
    made = rows.cycled([{"n": i} for i in range(5)], 13, seed=1)
    counts = np.bincount([row["n"] for row in made])
    assert counts.sum() == 13
    assert set(counts) == {2, 3}
    assert made == rows.cycled([{"n": i} for i in range(5)], 13, seed=1)
    assert made != rows.cycled([{"n": i} for i in range(5)], 13, seed=2)
    assert rows.cycled([], 0, seed=0) == []


def test_leaky_rows_train_every_token_after_the_prompt_once() -> None:
    task = get_task("products")
    tokenizer = task.tokenizer()
    (row,) = task.rows(1, seed=0)
    (leaky,) = rows.leaky_rows([row], tokenizer)
    ours, theirs = row_to_trie(row, tokenizer), row_to_trie(leaky)
    prompt = len(tokenizer.encode(row["prompt"]))
    np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)  # the same tokens are computed
    np.testing.assert_array_equal(ours.parent, theirs.parent)
    assert (theirs.weights[:prompt] == 0).all()
    assert (theirs.weights[prompt:] == 1).all()
    # What is trained in addition: three headers beside the path, the header on it, three joined copies, the newline.
    extra = int(theirs.weights.sum() - ours.weights.sum())
    body = len(tokenizer.encode(row["text"].split("<Thread>\n2:")[1].split("<Thread>")[0]))
    assert ours.weights.sum() == len(tokenizer.encode(row["text"])) + 1 - 4 * 4 - 1 - 1
    assert extra > 3 * body
    whole = ReasoningTrie.from_sequences(leaky["sequences"])
    assert theirs.num_tokens == whole.num_tokens


def test_leaky_data_set_holds_the_tries_of_the_leaky_rows() -> None:
    task = get_task("products")
    tokenizer = task.tokenizer()
    made = [*task.rows(2, seed=0), *task.rows(1, seed=1, style="sequential")]
    packed = rows.leaky_dataset(made, tokenizer)
    expected, statistics = prepare_dataset(
        Dataset.from_list(rows.leaky_rows(made, tokenizer)), tokenizer, max_tokens=4096, pack_samples=False
    )
    for name in PACKED_COLUMNS:
        assert list(packed[name]) == list(expected[name]), name
    through, own = prepare_dataset(packed, tokenizer, max_tokens=4096, pack_samples=False)
    assert len(through) == 3
    assert (own.tokens, own.targets, own.sequences) == (statistics.tokens, statistics.targets, statistics.sequences)


def test_tokens_are_counted_in_the_rows_that_a_data_set_shows() -> None:
    shown = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]}).select([1, 1, 0])
    assert training._count(shown, tries=False) == (5, 4)
    weighted = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "target_weights": [[2, 3], []]}).select([1, 1, 0])
    assert training._count(weighted, tries=True) == (5, 5)


@pytest.mark.parametrize(
    ("count", "device", "several"), [(999, "cuda", False), (1000, "cuda", True), (9000, "cpu", False)]
)
def test_the_cpu_that_trains_is_not_shared_with_packing(count: int, device: str, several: bool) -> None:
    assert (training.packing_processes(count, device) is not None) == several


def test_equations_helper_finds_a_wrong_one() -> None:
    assert holds_true_equations("2 * 3 = 6 = 1 + 5") == 2
    with pytest.raises(AssertionError, match=r"2 \* 3 = 7"):
        holds_true_equations("x 2 * 3 = 7")
