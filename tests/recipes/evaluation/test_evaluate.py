"""`eval` from end to end on scripted engines and on a tiny random model."""

import json

import pytest

from tests.support.rollouts import FORKED, text_engine
from tw_recipes.cli import main as threadweaver
from tw_recipes.decoding.engine import EngineError
from tw_recipes.decoding.scripted_engine import ScriptedEngine
from tw_recipes.evaluation.benchmarks import Problem
from tw_recipes.evaluation.command import EvalOptions, run_eval
from tw_recipes.evaluation.evaluate import Baseline, evaluate
from tw_recipes.evaluation.grading import ExactGrader
from tw_recipes.rollout_command import EngineOptions, make_decoder


@pytest.fixture
def problems(tmp_path):
    """Three problems; FORKED answers 7, so two of them are right."""
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"Q{n} <b>?", "answer": answer} for n, answer in enumerate(["7", "14/2", "8"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(model, problems, out, **more):
    return EvalOptions(str(problems), out, EngineOptions(str(model)), progress=False, **more)


def test_every_number_of_a_scripted_run(model, tokenizer, problems, tmp_path):
    result = run_eval(
        options(model, problems, tmp_path / "o", samples=2, baseline="sequential"), engine=text_engine(tokenizer)
    )
    total = len(tokenizer.encode(FORKED, add_special_tokens=False)) + 1
    shorter = len(tokenizer.encode("\n2: three\n", add_special_tokens=False))
    path = result.samples[0].critical_path_tokens
    assert path == total - shorter  # the shorter thread's body runs beside the longer one
    assert result.accuracy.value == pytest.approx(2 / 3)
    assert result.accuracy.pass_at == {1: pytest.approx(2 / 3), 2: pytest.approx(2 / 3)}
    assert result.accuracy.interval.method.startswith("bootstrap")
    assert [(s.problem, s.sample, s.correct) for s in result.samples[::2]] == [
        ("0", 0, True),
        ("1", 0, True),
        ("2", 0, False),
    ]
    assert result.measures["total_tokens"] == total
    assert result.measures["threads_per_block"] == 2.0
    assert result.measures["activation_ratio"] == result.measures["format_correctness"] == 1.0
    assert result.speedup.mean == result.speedup.max_correct == pytest.approx(total / path)
    assert {sample.total_tokens for sample in result.baseline} == {total}
    saved = json.loads((tmp_path / "o" / "results.json").read_text())
    values = {(r["impl"], r["metric"]): r["value"] for r in saved["records"]}
    name = model.name
    assert values[name, "accuracy"] == pytest.approx(2 / 3)
    assert f"| pass@n, {name} | 66.7% |" in (tmp_path / "o" / "table.md").read_text()
    # The sequential run wrote the same tags in one call: they earn it nothing.
    assert values[f"{name}, sequential", "token_latency"] == total
    assert values[f"{name}, sequential", "activation_ratio"] == 0.0
    assert {tuple(sorted(r)) for r in saved["records"]} == {("case", "impl", "metric", "unit", "value")}
    assert saved["meta"]["command"] == "threadweaver eval"


def test_the_folder_holds_a_self_contained_report(model, tokenizer, problems, tmp_path):
    run_eval(options(model, problems, tmp_path / "o", baseline="sequential"), engine=text_engine(tokenizer))
    out = tmp_path / "o"
    for stem in ("accuracy_latency", "speedup"):
        assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{stem}.svg").read_text()
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 2
    assert page.count('class="lane"') == 2 * 3
    assert "Q0 &lt;b&gt;?" in page
    assert "<b>?" not in page
    assert "src=" not in page
    assert "Wilson" in page
    table = (out / "table.md").read_text()
    assert "| accuracy, " in table
    assert "66.7% [" in table


def test_going_on_decodes_nothing_twice(model, tokenizer, problems, tmp_path):
    job = options(model, problems, tmp_path / "o")
    first, engine = run_eval(job, engine=text_engine(tokenizer)), text_engine(tokenizer)
    second = run_eval(job, engine=engine)
    assert engine.requests == []
    assert (first.run.written, second.run.written, second.run.skipped) == (3, 0, 3)
    assert second.accuracy == first.accuracy


def test_a_finished_run_is_a_baseline(model, tokenizer, problems, tmp_path):
    run_eval(options(model, problems, tmp_path / "base"), engine=text_engine(tokenizer, "No fork. \\boxed{7}"))
    file = str(tmp_path / "base" / "trajectories.jsonl")
    result = run_eval(options(model, problems, tmp_path / "o", baseline=file), engine=text_engine(tokenizer))
    assert result.speedup.mean < 1  # the forked text is longer than the short one
    assert result.speedup.mean_correct == pytest.approx(result.speedup.mean)


def test_a_baseline_of_other_problems_is_refused(model, tokenizer, problems, tmp_path):
    """It gave a report without any speedup, and without a word."""
    run_eval(options(model, problems, tmp_path / "base"), engine=text_engine(tokenizer))
    decoder = make_decoder(EngineOptions(str(model)), tokenizer, text_engine(tokenizer))
    baseline = Baseline(path=tmp_path / "base" / "trajectories.jsonl")
    with pytest.raises(ValueError, match=r"trajectories.jsonl has none of the 1 problems; name a run on the same"):
        evaluate([Problem("x", "Q", "7")], decoder, tokenizer, tmp_path, grader=ExactGrader(), baseline=baseline)


def test_published_figures_stand_beside_ours(model, tokenizer, tmp_path):
    decoder = make_decoder(EngineOptions(str(model)), tokenizer, text_engine(tokenizer))
    problems = [Problem("a", "Q", "7")]
    result = evaluate(problems, decoder, tokenizer, tmp_path, case="MATH-500", grader=ExactGrader())
    assert result.case == "math500"
    assert "MATH500" in result.table
    assert "| token latency, published: Qwen3-8B ThreadWeaver | 6,400 |" in result.table
    assert "| max speedup (correct), published: Qwen3-8B ThreadWeaver | 3.05 |" in result.table
    assert "arXiv:2512.07843" in (tmp_path / "table.md").read_text()


def test_a_lost_trajectory_counts_as_wrong_and_as_not_finished(model, tokenizer, tmp_path):
    engine = ScriptedEngine([EngineError("gone")], [tokenizer.eos_token_id])
    decoder = make_decoder(EngineOptions(str(model)), tokenizer, engine)
    sequential = make_decoder(EngineOptions(str(model), max_depth=0), tokenizer, text_engine(tokenizer))
    problems = [Problem("a", "Q", "7"), Problem("b", "Q", "7")]
    result = evaluate(
        problems, decoder, tokenizer, tmp_path, grader=ExactGrader(), concurrency=1, baseline=Baseline(sequential)
    )
    assert result.accuracy.value == 0.0
    assert result.measures["finished"] == 0.5
    assert result.speedup.mean_correct is None
    with pytest.raises(ValueError, match="problems is empty"):
        evaluate([], decoder, tokenizer, tmp_path)


def test_the_command_with_a_tiny_random_model(model, problems, tmp_path, capsys):
    flags = ["eval", str(problems), "--model", str(model), "--out", str(tmp_path / "o"), "--max-total-tokens", "16"]
    assert threadweaver([*flags, "--baseline", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "| token latency, " in printed
    assert "mean speedup" in printed
    records = json.loads((tmp_path / "o" / "results.json").read_text())["records"]
    assert all(0 <= r["value"] <= 1 for r in records if r["metric"].startswith("accuracy"))
    assert next(r["value"] for r in records if r["metric"] == "total_tokens") <= 16
    # Other settings in the same folder are refused, with exit status 1.
    assert threadweaver([*flags, "--temperature", "0"]) == 1
    assert "was made with temperature=0.6" in capsys.readouterr().err


def test_bad_flags_and_data_have_exit_codes(model, tmp_path, capsys):
    assert threadweaver(["eval", "gsm9k", "--model", str(model), "--out", str(tmp_path)]) == 1
    assert "data set must be one of aime24" in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong:
        threadweaver(["eval"])
    assert wrong.value.code == 2
