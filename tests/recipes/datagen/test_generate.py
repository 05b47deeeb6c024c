"""From sequential traces to a training set through a real HTTP server, from the command line to SFT's reader."""

import json
import time
from pathlib import Path

import pytest

from tests.support.annotator import RuleAnnotator, served
from tests.support.traces import trace_file, traces
from tw_recipes.cli import main as threadweaver
from tw_recipes.data import read_rows, write_jsonl
from tw_recipes.datagen.command import main
from tw_recipes.datagen.generate import EndpointOptions, JobOptions, all_usage, dry_run, generate_data
from tw_recipes.datagen.llm import LLMReply
from tw_recipes.datagen.mix import MixOptions, read_dataset
from tw_recipes.datagen.models import Sample, Trace
from tw_recipes.datagen.reasons import Reason
from tw_recipes.datagen.source import Columns, read_traces
from tw_recipes.sft.command import load_split
from tw_recipes.sft.data import prepare_dataset
from tw_recipes.tasks import get_task

COUNT = 24


def job(folder: Path, count: int = COUNT, **options) -> JobOptions:
    source = folder / "traces.jsonl"
    if not source.exists():
        trace_file(source, count)
    fields = {"endpoint": EndpointOptions("rule"), "grader": "exact", "mix": MixOptions(0.0, "text"), "shard_size": 10}
    return JobOptions(str(source), folder / "out", **fields | options)


def test_traces_become_the_tasks_own_solutions_over_http_and_sft_reads_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-of-the-test")
    seen = []
    source = trace_file(tmp_path / "traces.jsonl", COUNT)
    words = ["generate-data", str(source), "--out", str(tmp_path / "out"), "--model", "rule", "--grader", "exact"]
    words += ["--mix.format", "text", "--mix.sequential-share", "0", "--api-key-env", "MY_KEY", "--no-progress"]
    with served(RuleAnnotator(), refuse=seen.append) as url:
        assert threadweaver([*words, "--base-url", url]) == 0
    assert f"{COUNT} fork/join and 0 sequential rows" in capsys.readouterr().out
    assert {body["headers"]["authorization"] for body in seen} == {"Bearer sk-of-the-test"}
    assert len(seen) == 5 * COUNT

    # The annotator knows the task's structure, so the result must be what the task itself would write.
    task = get_task("products")
    own = task.rows(COUNT, seed=0)
    found = load_split(str(tmp_path / "out" / "dataset"), "train")
    assert found["text"] == [row["text"] for row in own]
    assert found["prompt"] == [row["prompt"] for row in own]
    assert found["answer"] == [row["answer"] for row in own]
    packed, statistics = prepare_dataset(found, task.tokenizer(), max_tokens=2048)
    assert statistics.sharing_ratio > 1.5
    assert len(packed) < COUNT

    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"sk-of-the-test" in data for data in written)
    calls = (tmp_path / "out" / "calls" / "worker-000.jsonl").read_text().splitlines()
    assert len(calls) == 5 * COUNT


def test_the_default_mix_has_messages_and_plain_traces(tmp_path):
    def none_for_some(request, answer):
        return {"blocks": []} if int(request.key) % 3 == 0 else answer

    result = generate_data(job(tmp_path, mix=MixOptions()), llm=RuleAnnotator({"blocks": none_for_some}))
    assert result.findings.kinds == {"forkjoin": 16, "sequential": 8}
    assert (result.mix.forkjoin, result.mix.sequential, result.mix.surplus) == (16, 1, 7)
    rows = list(read_dataset(tmp_path / "out" / "dataset", "messages"))
    plain = next(row for row in rows if row["kind"] == "sequential")
    trace = traces(COUNT)[int(plain["id"])]
    assert plain["messages"][0] == {"role": "user", "content": trace.question}
    assert plain["messages"][1]["content"] == f"<think>\n{trace.reasoning}</think>\n\n{trace.answer}"
    assert result.findings.reasons == {Reason.NO_BLOCKS: 8}


def test_every_model_is_booked_by_question_and_a_job_remembers(tmp_path):
    endpoint = EndpointOptions("big", models={"check": "small"}, prices={"big": (2.0, 10.0), "small": (1.0, 1.0)})
    options = job(tmp_path, endpoint=endpoint)
    result = generate_data(options, llm=RuleAnnotator())
    assert {model for (question, model) in result.usage if question == "check"} == {"small"}
    assert len(result.usage) == 5
    steps = result.usage["steps", "big"]
    assert steps.cost == pytest.approx((2 * steps.prompt_tokens + 10 * steps.completion_tokens) / 1e6)
    again = generate_data(options, llm=RuleAnnotator())
    assert (again.run.skipped, again.usage) == (COUNT, result.usage)
    assert all_usage(options.out / "calls", endpoint.annotators) == result.usage


def test_rows_that_cannot_be_read_are_rejected_by_place_and_reason(tmp_path):
    source = trace_file(tmp_path / "traces.jsonl", 3)
    rows = read_rows(source, ()).rows
    rows[1]["reasoning"] = None
    write_jsonl(source, rows)
    with source.open("a") as file:
        file.write("{broken\n")
    result = generate_data(job(tmp_path), llm=RuleAnnotator())
    assert result.findings.kinds == {"forkjoin": 2, "rejected": 2}
    assert [name for name, _ in result.findings.examples[Reason.INPUT_ROW]] == ["1", "3"]
    assert "line 2, column 'reasoning': expected a string, got null" in result.findings.examples["input_row"][0][1]


def test_parquet_files_and_data_set_folders_are_read_row_by_row(tmp_path):
    source = trace_file(tmp_path / "traces.jsonl", 5)
    data = load_split(str(source), "train")
    (tmp_path / "hub").mkdir()
    data.to_parquet(tmp_path / "hub" / "train.parquet")
    expected = list(read_traces(str(source), Columns()))
    assert list(read_traces(str(tmp_path / "hub" / "train.parquet"), Columns())) == expected
    assert list(read_traces(str(tmp_path / "hub"), Columns())) == expected  # as a data set of the Hub, streamed
    bad = list(read_traces(str(tmp_path / "hub"), Columns(answer="x")))
    assert [sample.place for sample in bad] == list(range(5))
    assert "row 1, column 'x': expected a non-empty string; the row has question" in bad[0].dropped[0].detail


def test_answers_are_graded_as_mathematics_by_default(tmp_path):
    trace = traces(1)[0]
    row = {"question": trace.question, "reasoning": trace.reasoning, "answer": "So \\boxed{\\frac{2}{4}}"}
    rows = [row | {"ground_truth": truth} for truth in ("0.5", "0.6")]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    result = generate_data(job(tmp_path, grader="math", grade_workers=1), llm=RuleAnnotator())
    assert result.findings.kinds == {"forkjoin": 1, "rejected": 1}
    assert result.findings.reasons == {Reason.INPUT_WRONG: 1}


def test_progress_is_shown_on_stderr(tmp_path, capsys):
    assert main([*words(tmp_path)[:-1], "--progress"], llm=RuleAnnotator()) == 0
    err = capsys.readouterr().err
    assert "6 forkjoin" in err
    assert "tokens, cost 0.00" in err


def test_a_whole_response_in_one_column_is_cut_at_its_thought(tmp_path):
    rows = [
        {"problem": "q", "solution": "<think>\na\nb\n</think>\n\n\\boxed{1}", "gold": "1", "name": "x"},
        {"problem": "q", "solution": "no thought", "gold": "1", "name": "y"},
    ]
    source = write_jsonl(tmp_path / "t.jsonl", rows)
    first, second = read_traces(str(source), Columns("problem", "solution", None, "gold", "name"))
    assert first == Trace(place=0, id="x", question="q", reasoning="a\nb\n", answer="\\boxed{1}", truth="1")
    assert isinstance(second, Sample)
    assert second.dropped[0].reason == Reason.INPUT_ROW


def test_workers_share_a_job_and_one_more_call_writes_the_data_set(tmp_path):
    for worker in range(2):
        result = generate_data(job(tmp_path, worker=worker, workers=2), llm=RuleAnnotator())
        assert (result.findings, result.mix) == (None, None)
    assert not (tmp_path / "out" / "dataset").exists()
    llm = RuleAnnotator()
    result = generate_data(job(tmp_path), llm=llm)
    assert (result.mix.forkjoin, llm.asked) == (COUNT, [])
    assert sum(usage.calls for usage in result.usage.values()) == 5 * COUNT


def words(folder: Path, *more: str) -> list[str]:
    source = folder / "traces.jsonl"
    if not source.exists():
        trace_file(source, 6)
    return [str(source), "--out", str(folder / "out"), "--model", "rule", "--grader", "exact", "--no-progress", *more]


def test_exit_codes(tmp_path, capsys):
    fails = RuleAnnotator({"check": lambda request, answer: 1 / 0 if request.key == "2" else answer})
    assert main(words(tmp_path), llm=fails) == 1
    assert "1 records failed" in capsys.readouterr().err
    assert main(words(tmp_path), llm=RuleAnnotator()) == 0
    assert main(words(tmp_path, "--stages.min-saving", "1"), llm=RuleAnnotator()) == 1
    assert "was made with stages=" in capsys.readouterr().err
    (tmp_path / "budget").mkdir()
    budget = words(tmp_path / "budget", "--max-tokens", "25000")
    assert main(budget, llm=RuleAnnotator()) == 3
    assert "the budget is used up" in capsys.readouterr().err
    assert main([*budget[:-1], "999999999"], llm=RuleAnnotator()) == 0
    (tmp_path / "none").mkdir()
    nothing = RuleAnnotator({"blocks": lambda request, answer: {"blocks": []}})
    assert main(words(tmp_path / "none"), llm=nothing) == 1
    assert "no record became a fork/join sample" in capsys.readouterr().err
    assert main(["missing.jsonl", "--out", str(tmp_path / "x"), "--model", "m"], llm=nothing) == 1
    assert "missing.jsonl does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--no-such-flag"])


def test_a_dry_run_asks_and_writes_nothing(tmp_path, capsys):
    class Silent(RuleAnnotator):
        async def complete(self, request):
            raise AssertionError("asked")

    line = words(tmp_path, "--dry-run", "--prices", "rule", "2", "10")
    assert main(line, llm=Silent()) == 0
    text = capsys.readouterr().out
    assert "6 traces (0 rows cannot be read), 5 questions each" in text
    assert "assumed: one block of 3 threads" in text
    assert not (tmp_path / "out").exists()
    plan = dry_run(job(tmp_path, endpoint=EndpointOptions("rule", prices={"rule": (2.0, 10.0)})))
    real = generate_data(job(tmp_path), llm=RuleAnnotator())
    spent = sum(usage.prompt_tokens for usage in real.usage.values())
    assert 0.5 < sum(row[3] for row in plan.rows) / spent < 2
    assert plan.cost == pytest.approx(sum(2e-6 * row[3] + 1e-5 * row[4] for row in plan.rows))


def test_a_dry_run_on_other_columns_names_them(tmp_path, capsys):
    """It planned 0 traces at no cost, with exit status 0."""
    assert main(words(tmp_path, "--dry-run", "--columns.question", "problem")) == 1
    said = capsys.readouterr().err
    assert "must hold traces, got 6 rows and none that can be read" in said
    assert "line 1, column 'problem': expected the columns problem, reasoning, answer, ground_truth, got " in said
    (tmp_path / "empty.jsonl").write_text("")
    assert main([str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "o"), "--model", "m", "--dry-run"]) == 1
    assert "empty.jsonl must hold traces, got no row" in capsys.readouterr().err


def test_nothing_is_asked_of_a_service_without_its_key(tmp_path, capsys, monkeypatch):
    """OpenAI was called with the key "none"."""
    monkeypatch.delenv("MY_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert main(words(tmp_path, "--api-key-env", "MY_KEY")) == 1
    said = capsys.readouterr().err
    assert "the environment variable MY_KEY must hold the key of OpenAI, which is asked without base_url" in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    EndpointOptions("m", api_key_env="MY_KEY").llm()


def test_a_job_on_changed_traces_is_not_gone_on_with(tmp_path, capsys):
    source = trace_file(tmp_path / "traces.jsonl", 6)
    assert main(words(tmp_path), llm=RuleAnnotator()) == 0
    text = source.read_text()
    source.write_text(text.replace("1", "2", 1))  # the number of bytes stays
    assert main(words(tmp_path), llm=RuleAnnotator()) == 1
    assert "was made with sha256=" in capsys.readouterr().err
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())
    del kept["sha256"]  # as before contents were compared
    (tmp_path / "out" / "settings.json").write_text(json.dumps(kept))
    assert main(words(tmp_path), llm=RuleAnnotator()) == 0


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"models must name questions \(steps, .*\), got title"):
        EndpointOptions("m", models={"title": "n"})
    with pytest.raises(ValueError, match="max_cost needs the prices of every model, m has none"):
        EndpointOptions("m", max_cost=1.0)
    for extra in ("{", "[1]"):
        with pytest.raises(ValueError, match="extra must be a JSON object, got"):
            EndpointOptions("m", extra=extra)
    with pytest.raises(ValueError, match="attempts must be >= 1 and timeout_s > 0, got 0 and"):
        EndpointOptions("m", attempts=0)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0; leave it out for all rows"):
        JobOptions("traces.jsonl", Path("out"), EndpointOptions("m"), limit=0)


def test_a_rate_limit_slows_a_job_down(tmp_path):
    began = time.monotonic()
    generate_data(job(tmp_path, 3, endpoint=EndpointOptions("rule", requests_per_minute=600)), llm=RuleAnnotator())
    # 15 calls: ten at once, then one every tenth of a second.
    assert time.monotonic() - began >= 0.5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(row["calls"] for row in report["usage"]) == 15


def test_replies_with_usage_of_their_own_are_booked_as_the_server_counts(tmp_path):
    tricks = {"steps": lambda request, answer: LLMReply(json.dumps(answer), "stop", 1000, 7)}
    result = generate_data(job(tmp_path), llm=RuleAnnotator(tricks))
    assert result.usage["steps", "rule"].prompt_tokens == 1000 * COUNT
