r"""`threadweaver eval`: a model on a data set, with accuracy, token latency and speedup.

    threadweaver eval math500 --model out/rl --samples 4 --baseline sequential --out out/eval
    threadweaver eval mine.jsonl --model out/sft --baseline out/sequential-model --out out/eval

Exit status: 0 measured, 1 trajectories failed or could not be graded, or the input is bad, 2 wrong flags.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tw_core.errors import ThreadWeaverError
from tw_recipes.decoding.engine import Engine
from tw_recipes.decoding.rollout import LOST
from tw_recipes.evaluation.benchmarks import load_problems
from tw_recipes.evaluation.evaluate import INSTRUCTION, Baseline, EvalResult, PromptFormat, evaluate
from tw_recipes.evaluation.grading import ExactGrader, Grader, GraderPool
from tw_recipes.rollout_command import EngineOptions, load_tokenizer, make_decoder, make_engine, with_content


@dataclass(frozen=True)
class EvalOptions:
    """Measure a model on a data set; the same command again goes on after a kill.

    Attributes:
        dataset: aime24, aime25, amc23, math500, minerva, olympiad, or a .jsonl or .parquet file.
        out: Folder for results.json, table.md, plots, report.html and the trajectories.
        engine: The model and how it decodes.
        path: A local copy (or another Hub name) of a named data set.
        question_column: Column of the question.
        answer_column: Column of the answer.
        limit: Only the first so many problems.
        samples: Responses per problem.
        baseline: What speedups are measured against: "sequential" (the same model without forks), the folder or Hub
            name of another model (run without forks, in the same way), or the trajectories.jsonl of an earlier run.
        instruction: Appended to every question.
        raw: Encode questions as they are, without the chat template.
        think: Let the response start after "<think>".
        grader: "math" is math-verify; "exact" compares the boxed text.
        grade_workers: Grading processes.
        grade_timeout_s: Seconds for one response.
        concurrency: Trajectories in flight.
        examples: Trajectories that the page shows.
        progress: Show a progress bar on stderr.
    """

    dataset: Annotated[str, tyro.conf.Positional]
    out: Path
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")]
    path: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    limit: int | None = None
    samples: int = 1
    baseline: str | None = None
    instruction: str = INSTRUCTION
    raw: bool = False
    think: bool = False
    grader: Literal["math", "exact"] = "math"
    grade_workers: int = 2
    grade_timeout_s: float = 5.0
    concurrency: int = 64
    examples: int = 20
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())


def run_eval(options: EvalOptions, command: str = "threadweaver eval", engine: Engine | None = None) -> EvalResult:
    """What `threadweaver eval` does; `engine` replaces the one that the flags describe."""
    problems = load_problems(
        options.dataset,
        path=options.path,
        question_column=options.question_column,
        answer_column=options.answer_column,
        limit=options.limit,
    )
    tokenizer = load_tokenizer(options.engine.model)
    engine = engine if engine is not None else make_engine(options.engine, tokenizer)
    prompt = PromptFormat(options.instruction, options.raw, options.think)
    grader: Grader = ExactGrader()
    if options.grader == "math":
        grader = GraderPool(options.grade_workers, options.grade_timeout_s)
    try:
        return evaluate(
            problems,
            make_decoder(options.engine, tokenizer, engine),
            tokenizer,
            options.out,
            case=options.dataset if not Path(options.dataset).suffix else Path(options.dataset).stem,
            samples=options.samples,
            baseline=_baseline(options, engine, tokenizer),
            grader=grader,
            name=Path(options.engine.model).name,
            prompt=prompt,
            concurrency=options.concurrency,
            examples=options.examples,
            settings=_settings(options, options.engine, "trajectories.jsonl"),
            command=command,
            progress=options.progress,
        )
    finally:
        grader.close()


def _settings(options: EvalOptions, engine: EngineOptions, file: str) -> dict[str, Any]:
    """What the trajectories of a file in the output folder depend on."""
    shared = {"instruction": options.instruction, "raw": options.raw, "think": options.think, "data": options.dataset}
    return with_content(engine.settings() | shared, options.path or options.dataset, options.out / file)


def _baseline(options: EvalOptions, engine: Engine, tokenizer: object) -> Baseline | None:
    if options.baseline is None:
        return None
    if options.baseline.endswith(".jsonl"):
        return Baseline(path=Path(options.baseline), name=f"baseline {options.baseline}")
    flat = replace(options.engine, max_depth=0)
    if options.baseline == "sequential":
        decoder = make_decoder(flat, tokenizer, engine)
        name = f"{Path(flat.model).name}, sequential"
        return Baseline(decoder, name=name, settings=_settings(options, flat, "baseline.jsonl"))
    if flat.base_url:
        raise ValueError(
            "baseline must be 'sequential' or a trajectories.jsonl when base_url is given: the servers hold one model; "
            "evaluate the other model first and name its file"
        )
    flat = replace(flat, model=options.baseline)
    other = load_tokenizer(flat.model)
    return Baseline(
        make_decoder(flat, other),
        name=f"{Path(flat.model).name}, sequential",
        settings=_settings(options, flat, "baseline.jsonl"),
        tokenizer=other,
    )


def main(argv: Sequence[str]) -> int:
    """Parse flags, evaluate, print the table; the result is the exit status."""
    options = tyro.cli(EvalOptions, args=list(argv), prog="threadweaver eval")
    try:
        result = run_eval(options, shlex.join(["threadweaver", "eval", *argv]))
    except (ThreadWeaverError, OSError, ValueError) as error:
        print(f"threadweaver eval: {error}", file=sys.stderr)
        return 1
    print((result.out / "table.md").read_text(encoding="utf-8"))
    print(result.run)
    print(f"report: {result.out / 'report.html'}")
    lost = sum(sample.status in LOST for sample in [*result.samples, *result.baseline])
    ungraded = sum(sample.grade == "error" for sample in [*result.samples, *result.baseline])
    if lost or ungraded:
        print(
            f"threadweaver eval: {lost} trajectories failed and {ungraded} responses could not be graded; they count "
            "as wrong, results.json names them",
            file=sys.stderr,
        )
    return int(bool(lost or ungraded))
