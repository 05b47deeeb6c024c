"""Rounds of self-training: decode, keep, merge with stage 1, train, decode with what was trained."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.annotator import RuleAnnotator
from tests.support.rollouts import FORKED, text_engine
from tests.support.traces import trace_file
from tw_recipes.cli import main as threadweaver
from tw_recipes.data import write_jsonl
from tw_recipes.datagen.generate import EndpointOptions, JobOptions, generate_data
from tw_recipes.datagen.mix import read_dataset
from tw_recipes.datagen.reasons import DatagenError
from tw_recipes.datagen.rounds import SelfTrainOptions, self_train_rounds
from tw_recipes.rollout_command import EngineOptions, load_tokenizer
from tw_recipes.sft.command import load_split
from tw_recipes.sft.data import prepare_dataset

PLAIN = "No fork: \\boxed{7}."


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    source = trace_file(folder / "traces.jsonl", 5)
    generate_data(JobOptions(str(source), folder, EndpointOptions("rule"), grader="exact"), llm=RuleAnnotator())
    return folder / "dataset"


def options(folder: Path, model: Path, **more) -> SelfTrainOptions:
    problems = folder / "problems.jsonl"
    if not problems.exists():
        rows = [{"prompt": f"What is {n}?", "answer": "7" if n % 2 else "8"} for n in range(6)]
        write_jsonl(problems, rows)
    engine = EngineOptions(str(model), max_total_tokens=400)
    return SelfTrainOptions(problems, folder / "out", engine, **{"grader": "exact", "samples": 2} | more)


class Engines:
    """A scripted engine for each model; remembers which models decoded."""

    def __init__(self, tokenizer, *texts: str) -> None:
        self.tokenizer, self.texts, self.models = tokenizer, texts, []

    def __call__(self, name: str):
        self.models.append(name)
        return text_engine(self.tokenizer, self.texts[min(len(self.models), len(self.texts)) - 1])


def copied(calls: list) -> object:
    """Training that copies the base model."""

    def train(base: str, data: Path, out: Path) -> None:
        calls.append((base, data, len(load_split(str(data), "train"))))
        shutil.copytree(base, out)

    return train


def test_two_rounds_keep_what_is_good_merge_and_train(tmp_path, model, stage1):
    tokenizer, trained, seen = load_tokenizer(str(model)), [], []
    engines = Engines(tokenizer, FORKED, FORKED.replace("Plan.", "A plan."))
    job = options(tmp_path, model, stage1=stage1, rounds=2, train_config=tmp_path / "sft.yaml")
    first, second = self_train_rounds(job, make_engine=engines, train=copied(trained), on_round=seen.append)
    # Three of six problems have the answer that the engine gives; both samples of a problem are the same text.
    assert first.dropped == {"wrong_answer": 3, "duplicate": 6}
    assert (first.trajectories, first.kept, first.rows, first.failed) == (12, 3, 8, 0)
    assert (first.format_correctness, first.accuracy) == (1.0, pytest.approx(9 / 12))
    assert seen == [first, second]
    assert "round 1: 12 trajectories, format 100.0%" in str(first)
    assert engines.models == [str(model), str(tmp_path / "out" / "round-1" / "model")]
    assert trained == [(str(model), tmp_path / "out" / "round-1" / "dataset", 8)]
    assert (first.model, second.model) == (engines.models[1], "")

    rows = list(read_dataset(tmp_path / "out" / "round-2" / "dataset", "messages"))
    assert [row["source"] for row in rows] == ["rewritten"] * 5 + ["self_training_2"] * 3
    own = rows[-1]
    assert own["messages"][1]["content"] == FORKED.replace("Plan.", "A plan.")
    assert (own["kind"], own["blocks"], own["threads"], own["answer"]) == ("forkjoin", 1, 2, "7")
    assert own["acceleration"] > 0
    merged = load_split(str(tmp_path / "out" / "round-2" / "dataset"), "train")
    assert len(prepare_dataset(merged, tokenizer, max_tokens=4096)[0])

    again = self_train_rounds(job, make_engine=engines, train=copied(trained))
    assert again == [first, second]
    assert (len(engines.models), len(trained)) == (2, 1)


def test_a_round_that_was_decoded_is_not_decoded_again(tmp_path, model):
    engines = Engines(load_tokenizer(str(model)), FORKED)
    job = options(tmp_path, model, think=True)
    (first,) = self_train_rounds(job, make_engine=engines)
    (tmp_path / "out" / "round-1" / "round.json").unlink()
    engines.texts = ("broken",)
    (again,) = self_train_rounds(job, make_engine=engines)
    assert again == first
    row = next(read_dataset(tmp_path / "out" / "round-1" / "dataset", "messages"))
    assert row["messages"][1]["content"] == "<think>\n" + FORKED


def test_a_problem_without_an_answer_is_named_before_anything_is_decoded(tmp_path, model):
    """It was a KeyError after the decoding."""
    engines = Engines(load_tokenizer(str(model)), FORKED)
    with pytest.raises(DatagenError, match=r"row 1 has no answer in 'solution', its columns are prompt, answer; set"):
        self_train_rounds(options(tmp_path, model, answer_column="solution"), make_engine=engines)
    assert not engines.models


def test_answers_may_be_numbers(tmp_path, model):
    """A grader died of them: every trajectory was ungraded."""
    write_jsonl(tmp_path / "problems.jsonl", [{"prompt": "What is 1?", "answer": 7}])
    (result,) = self_train_rounds(options(tmp_path, model), make_engine=Engines(load_tokenizer(str(model)), FORKED))
    assert result.kept == 1


def test_a_round_that_keeps_nothing_says_what_it_saw(tmp_path, model):
    engines = Engines(load_tokenizer(str(model)), "\\boxed{3}")
    with pytest.raises(DatagenError, match=r"round 1 kept none of 12 trajectories \(.*6 wrong_answer.*train the model"):
        self_train_rounds(options(tmp_path, model), make_engine=engines)


def test_training_runs_the_command_and_its_failure_ends_the_rounds(tmp_path, model):
    engines = Engines(load_tokenizer(str(model)), FORKED)
    says = "{python} -c \"import sys,pathlib; pathlib.Path(r'{out}').mkdir(); sys.exit(len('{base}{data}') < 20)\""
    job = options(tmp_path, model, train_last=True, train_command=says)
    (result,) = self_train_rounds(job, make_engine=engines)
    assert Path(result.model).is_dir()
    assert json.loads((tmp_path / "out" / "round-1" / "round.json").read_text())["model"] == result.model
    (tmp_path / "more").mkdir()
    fails = options(tmp_path / "more", model, train_last=True, train_command='{python} -c "raise SystemExit(5)"')
    with pytest.raises(DatagenError, match=r"training failed with status 5: .*raise SystemExit"):
        self_train_rounds(fails, make_engine=engines)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rounds": 2}, "train_config is missing"),
        ({"train_last": True}, "train_config is missing"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, model, more, match):
    with pytest.raises(ValueError, match=match):
        options(tmp_path, model, **more)


def test_servers_hold_one_model(tmp_path, model):
    with pytest.raises(ValueError, match="rounds must be 1 with base_url"):
        SelfTrainOptions(
            tmp_path / "p.jsonl",
            tmp_path,
            EngineOptions(str(model), base_url=("http://localhost:1/v1",)),
            rounds=2,
            train_config=tmp_path / "c.yaml",
        )


def test_the_command_decodes_with_a_real_model_and_says_why_nothing_is_left(tmp_path, model, capsys):
    problems = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "What?", "answer": "7"}])
    words = ["generate-data", "self-train", str(problems), "--out", str(tmp_path / "out"), "--model", str(model)]
    assert threadweaver([*words, "--samples", "2", "--max-total-tokens", "12", "--grader", "exact"]) == 1
    assert "round 1 kept none of 2 trajectories" in capsys.readouterr().err
