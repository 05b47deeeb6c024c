r"""`threadweaver generate-data`: sequential traces to fork/join training data, and rounds of self-training.

    threadweaver generate-data traces.jsonl --out out/data --model gpt-x --dry-run
    threadweaver generate-data traces.jsonl --out out/data --model Qwen3-235B \
        --base-url http://localhost:8000/v1
    threadweaver generate-data self-train problems.jsonl --out out/self --model out/sft --stage1 out/data/dataset

The same command again goes on where a killed run stopped. Exit status: 0 all done, 1 records failed, nothing came out
or the input is bad, 2 wrong flags, 3 the budget was used up (what is finished is written).
Guarded by tests/recipes/datagen/test_generate.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from tw_core.errors import ThreadWeaverError
from tw_recipes.datagen.generate import JobOptions, dry_run, generate_data, progress_bar
from tw_recipes.datagen.llm import LLM

BUDGET_USED_UP = 3


@dataclass(frozen=True)
class GenerateCommand:
    """Rewrite sequential traces into fork/join training data.

    Attributes:
        job: The job.
        dry_run: Print the plan and an estimate of tokens and cost, and stop.
        progress: Show a progress bar on stderr.
    """

    job: Annotated[JobOptions, tyro.conf.arg(name="")]
    dry_run: bool = False
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())


def main(argv: Sequence[str], *, llm: LLM | None = None) -> int:
    """Parse flags and run; the result is the exit status.

    Args:
        argv: Flags; "self-train" as the first word runs the rounds of stage 2.
        llm: Answers instead of the endpoint.
    """
    words = list(argv)
    try:
        if words[:1] == ["self-train"]:
            return _self_train(words[1:])
        return _generate(words, llm)
    except (ThreadWeaverError, OSError, ValueError) as error:
        print(f"threadweaver generate-data: {error}", file=sys.stderr)
        return 1


def _generate(argv: Sequence[str], llm: LLM | None) -> int:
    command = tyro.cli(
        GenerateCommand,
        args=list(argv),
        prog="threadweaver generate-data",
        description="Rewrite sequential traces into fork/join training data. `threadweaver generate-data self-train "
        "--help` lists the options of stage 2.",
    )
    job = command.job
    if command.dry_run:
        print(dry_run(job))
        return 0
    with progress_bar(command.progress, job.limit) as bar:
        result = generate_data(job, llm=llm, on_progress=bar)
    print(result.run)
    if result.mix is not None:
        print(f"{result.mix.forkjoin} fork/join and {result.mix.sequential} sequential rows in {job.out / 'dataset'}")
    if result.findings is None:
        print("this worker is done; when all are, run the command once without --workers to write the data set")
    else:
        print(f"report: {job.out / 'report.md'}")
    if result.problem:
        print(f"threadweaver generate-data: {result.problem}", file=sys.stderr)
    if result.run.failed:
        print(
            f"threadweaver generate-data: {result.run.failed} records failed, see {job.out / 'stages' / 'failed'}; run "
            "the command again to try them again",
            file=sys.stderr,
        )
    if result.run.stopped:
        print(f"threadweaver generate-data: {result.run.stopped}", file=sys.stderr)
        return BUDGET_USED_UP
    return int(bool(result.run.failed or result.problem))


def _self_train(argv: Sequence[str]) -> int:
    from tw_recipes.datagen.rounds import SelfTrainOptions, self_train_rounds

    options = tyro.cli(SelfTrainOptions, args=list(argv), prog="threadweaver generate-data self-train")
    results = self_train_rounds(options, on_round=print)
    failed = sum(result.failed for result in results)
    if failed:
        print(f"threadweaver generate-data: {failed} trajectories failed; their lines say why", file=sys.stderr)
    return int(failed > 0)
