"""Decodes problems, grades the responses, measures them, and writes the report.

    problems ──rollout──► trajectories.jsonl ──grade──► samples ──metrics──► EvalResult ──► json, md, plots, html
    baseline ──rollout──► baseline.jsonl     ──grade──► samples ───┘

Both rollouts go on after a kill; grading is repeated. `threadweaver eval` is command.py.
Guarded by tests/recipes/evaluation/test_evaluate.py.
"""

import asyncio
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from tw_recipes.blocking import run_blocking
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.evaluation import report
from tw_recipes.evaluation.benchmarks import Problem, benchmark_name
from tw_recipes.evaluation.grading import Grader, GraderPool
from tw_recipes.evaluation.metrics import Accuracy, Sample, Speedup, accuracy, measures, speedup
from tw_recipes.rollout import Prompt, RolloutSummary, read_trajectories, rollout
from tw_recipes.rollout_command import encode_prompt

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class EvalResult:
    """Everything an evaluation found.

    Attributes:
        case: The data set.
        accuracy: pass@1 with its interval, and pass@k.
        measures: Means over samples, see `metrics.measures`.
        speedup: Over the baseline, None without one.
        records: All of it as records of a results file, baseline and published figures included.
        table: Markdown.
        samples: The graded samples.
        baseline: Those of the baseline.
        run: What the rollout of this call did.
        out: The folder with the files.
    """

    case: str
    accuracy: Accuracy
    measures: Mapping[str, float]
    speedup: Speedup | None
    records: list[dict[str, Any]]
    table: str
    samples: list[Sample]
    baseline: list[Sample]
    run: RolloutSummary
    out: Path


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes token ids.

    Attributes:
        instruction: Appended to the question.
        raw: Encode as it is, without the chat template.
        think: Let the response start after "<think>".
    """

    instruction: str = INSTRUCTION
    raw: bool = False
    think: bool = False


@dataclass(frozen=True)
class Baseline:
    """The sequential run that speedups are measured against.

    Attributes:
        decoder: Decodes it; give it `Limits(...).sequential()`. None: `path` is finished.
        path: Its file of trajectories. Defaults to baseline.jsonl in the output folder.
        name: How tables call it.
        settings: As for `rollout`.
        tokenizer: Of its model. Defaults to that of the evaluated one.
    """

    decoder: ForkJoinDecoder | None = None
    path: Path | None = None
    name: str = "sequential"
    settings: Mapping[str, Any] | None = None
    tokenizer: Any = None


def evaluate(
    problems: Sequence[Problem],
    decoder: ForkJoinDecoder,
    tokenizer: Any,
    out: str | Path,
    *,
    case: str = "local",
    samples: int = 1,
    baseline: Baseline | None = None,
    grader: Grader | None = None,
    name: str = "fork/join",
    prompt: PromptFormat | None = None,
    concurrency: int = 64,
    examples: int = 20,
    settings: Mapping[str, Any] | None = None,
    command: str = "tw_recipes.evaluation.evaluate(...)",
    progress: bool = False,
) -> EvalResult:
    """Measures a model on problems with answers.

    Args:
        problems: See `load_problems`.
        decoder: Engine, limits and sampling.
        tokenizer: Of the model; its tags are single tokens.
        out: Folder for trajectories.jsonl, results.json, table.md, plots and report.html. Called again with the same
            folder, only missing trajectories are decoded.
        case: Name of the data set; published figures are shown beside ours for the published ones.
        samples: Responses per problem.
        baseline: A sequential run to compare with.
        grader: Defaults to a `GraderPool` that is closed at the end.
        name: How tables call this model.
        prompt: How questions become ids.
        concurrency: Trajectories in flight; wall clock is per problem at this concurrency.
        examples: Trajectories that the page shows.
        settings: As for `rollout`.
        command: What gives these figures again, for results.json.
        progress: Whether to show a progress bar on stderr.
    Raises:
        ValueError: No problems, or a baseline of other problems.
        RolloutFileError: The folder belongs to another run.
    """
    if not problems:
        raise ValueError("problems is empty; load a data set with load_problems")
    out, case, prompt = Path(out), benchmark_name(case) or case, prompt or PromptFormat()
    out.mkdir(parents=True, exist_ok=True)
    flow = _Flow(problems, prompt, samples, concurrency, progress)
    main_file = out / "trajectories.jsonl"
    run = flow.decode(decoder, tokenizer, main_file, settings)
    base_file = None
    if baseline is not None:
        base_file = baseline.path or out / "baseline.jsonl"
        if baseline.decoder is not None:
            flow.decode(baseline.decoder, baseline.tokenizer or tokenizer, base_file, baseline.settings)
    own = grader is None
    judge: Grader = GraderPool() if grader is None else grader
    with closing(judge) if own else nullcontext():
        graded = flow.grade(main_file, judge, samples)
        graded_base = flow.grade(base_file, judge, math.inf) if base_file is not None else []
    if base_file is not None and not graded_base:
        raise ValueError(
            f"the baseline {base_file} has none of the {len(problems)} problems; name a run on the same data"
        )
    exact = accuracy(graded)
    faster = speedup(graded, graded_base) if graded_base else None
    found = report.records(case, name, _metrics(exact, measures(graded), faster))
    if graded_base and baseline is not None:
        found += report.records(case, baseline.name, _metrics(accuracy(graded_base), measures(graded_base), None))
    found += report.published_records(case)
    result = EvalResult(
        case=case,
        accuracy=exact,
        measures=measures(graded),
        speedup=faster,
        records=found,
        table=report.markdown_table(found),
        samples=graded,
        baseline=graded_base,
        run=run,
        out=out,
    )
    notes = _notes(result, samples, concurrency, decoder, baseline)
    _write(result, notes, command, examples)
    return result


@dataclass
class _Flow:
    """Decoding and grading of one set of problems, for the model and for its baseline."""

    problems: Sequence[Problem]
    prompt: PromptFormat
    samples: int
    concurrency: int
    progress: bool
    answers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = {problem.id: problem.answer for problem in self.problems}

    def decode(
        self, decoder: ForkJoinDecoder, tokenizer: Any, path: Path, settings: Mapping[str, Any] | None
    ) -> RolloutSummary:
        """Makes sure that `path` has every trajectory."""
        return rollout(
            self._prompts(tokenizer),
            decoder,
            tokenizer,
            path,
            samples=self.samples,
            concurrency=self.concurrency,
            settings=settings,
            units=False,
            total=len(self.problems),
            progress=self.progress,
        )

    def _prompts(self, tokenizer: Any) -> Iterator[Prompt]:
        for problem in self.problems:
            text = problem.question + self.prompt.instruction
            ids = encode_prompt(tokenizer, text, raw=self.prompt.raw, think=self.prompt.think)
            yield Prompt(problem.id, ids, {"question": problem.question, "answer": problem.answer})

    def grade(self, path: Path, grader: Grader, samples: float) -> list[Sample]:
        """Grades the trajectories of these problems, at most `samples` each, in the order of problems and samples."""
        rows = (row for row in read_trajectories(path) if row.get("id") in self.answers and row["sample"] < samples)
        found = run_blocking(self._grade(rows, grader))
        places = {problem.id: place for place, problem in enumerate(self.problems)}
        return sorted(found, key=lambda s: (places[s.problem], s.sample))

    async def _grade(self, rows: Iterator[dict[str, Any]], grader: Grader) -> list[Sample]:
        found: list[Sample] = []
        while batch := list(islice(rows, 256)):  # bounds memory: texts are long
            found += await asyncio.gather(*(self._sample(row, grader) for row in batch))
        return found

    async def _sample(self, row: Mapping[str, Any], grader: Grader) -> Sample:
        grade = await grader.grade_async(row["text"], self.answers[row["id"]])
        return Sample(
            problem=row["id"],
            sample=row["sample"],
            # A trajectory that was lost has no answer, whatever its fragment says.
            correct=grade.correct and row["status"] in ("done", "length"),
            grade=grade.status,
            extracted=grade.extracted,
            status=row["status"],
            total_tokens=row["stats"]["total_tokens"],
            critical_path_tokens=row["token_latency"],
            num_blocks=row["forks"],
            num_threads=row["forked_threads"],
            format_ok=row["format_ok"],
            seconds=row["seconds"],
        )


def _metrics(exact: Accuracy, means: Mapping[str, float], faster: Speedup | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "accuracy": exact.value,
        "accuracy_low": exact.interval.low,
        "accuracy_high": exact.interval.high,
    }
    found |= {f"pass_at_{k}": value for k, value in exact.pass_at.items()}
    if (n := max(exact.pass_at)) > 1:
        found["pass_at_n"] = exact.pass_at[n]
    found |= means
    if faster is not None:
        found |= {
            "speedup_tokens": faster.ratio_of_means,
            "speedup_mean": faster.mean,
            "speedup_mean_correct": faster.mean_correct,
            "speedup_max_correct": faster.max_correct,
            "speedup_wall": faster.wall,
        }
    return found


def _notes(
    result: EvalResult, samples: int, concurrency: int, decoder: ForkJoinDecoder, baseline: Baseline | None
) -> list[str]:
    sampling = decoder.sampling
    problems = len({s.problem for s in result.samples})
    notes = [
        f"{problems} problems, {samples} samples each; temperature {sampling.temperature:g}, top-p {sampling.top_p:g}.",
        f"Interval of accuracy: {result.accuracy.interval.method}. "
        + ", ".join(f"pass@{k} {value:.1%}" for k, value in result.accuracy.pass_at.items())
        + " (unbiased estimator).",
        "Token latency is the number of tokens on the critical path. Wall clock is per problem, with at most "
        f"{concurrency} trajectories in flight.",
    ]
    if baseline is not None:
        notes.append(
            f"Speedup: mean tokens of the run '{baseline.name}' / mean token latency, per problem; (correct): correct "
            "samples alone, of problems that both runs solve."
        )
    if report.published_records(result.case):
        notes.append(f"Published figures: {report.published()['source']}; {report.published()['setting']}.")
    return notes


def _write(result: EvalResult, notes: Sequence[str], command: str, examples: int) -> None:
    out = result.out
    meta = {
        "command": command,
        "device": platform.processor() or platform.machine(),
        "torch": version("torch"),
        "triton": None,
        "transformers": version("transformers"),
        "commit": None,
        "date": datetime.now(UTC).date().isoformat(),
        "seed": 0,
        "notes": list(notes),
    }
    per_problem = result.speedup.per_problem if result.speedup is not None else {}
    content = {
        "meta": meta,
        "records": result.records,
        "samples": [sample._asdict() for sample in result.samples],
        "speedup_per_problem": per_problem,
    }
    (out / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = result.table + "\n" + "\n".join(f"{note}  " for note in notes) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    plots = [out / "accuracy_latency"]
    report.plot_latency(plots[0], result.records, result.case)
    if result.speedup is not None:
        plots.append(out / "speedup")
        report.plot_speedup(plots[1], result.speedup, result.case)
    shown = list(islice(read_trajectories(out / "trajectories.jsonl"), examples))
    known = {(sample.problem, sample.sample) for sample in result.samples}
    shown = [row for row in shown if (row["id"], row["sample"]) in known]
    html = report.html_report(f"Evaluation: {result.case}", result.records, notes, plots, result.samples, shown)
    (out / "report.html").write_text(html, encoding="utf-8")
