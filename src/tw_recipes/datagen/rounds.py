"""Stage 2 as rounds: decode with the model, keep what is good, merge with stage 1, train, again.

    round r   OUT/round-r/trajectories.jsonl   ForkJoinDecoder on the problems (resumable)
              OUT/round-r/dataset              chosen trajectories and the data set of stage 1
              OUT/round-r/round.json           format correctness, accuracy, what was left out and why
              OUT/round-r/model                trained on it; it decodes round r + 1

A round whose files are there is not repeated. Source: arXiv:2512.07843, self-training; SPEC section 7, stage 2.
Guarded by tests/recipes/datagen/test_rounds.py.
"""

import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tw_recipes.data import iter_rows
from tw_recipes.datagen.generate import make_grader
from tw_recipes.datagen.mix import Format, MixOptions, count_rows, dataset_row, read_dataset, write_parquet
from tw_recipes.datagen.reasons import DatagenError
from tw_recipes.datagen.self_training import Candidate, balance, judge, key_of, note, training_row
from tw_recipes.decoding.engine import Engine
from tw_recipes.rollout import read_trajectories
from tw_recipes.rollout_command import THINK, EngineOptions, RolloutOptions, load_tokenizer, run_rollout

TRAIN = (
    "{python} -m tw_recipes.cli sft --config {config} --model_name_or_path {base} --dataset_name {data} "
    "--output_dir {out}"
)


@dataclass(frozen=True)
class SelectOptions:
    """Which trajectories are kept.

    Attributes:
        per_problem: At most so many of one problem.
        max_bin_share: No range of acceleration holds a larger share, as far as there are others.
        bins: Edges of the ranges.
        max_sequential_share: At most this share never forked.
    """

    per_problem: int = 4
    max_bin_share: float = 0.5
    bins: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    max_sequential_share: float = 0.2


@dataclass(frozen=True)
class SelfTrainOptions:
    """Self-training rounds.

    Attributes:
        problems: .jsonl or .parquet file.
        out: Folder of the rounds.
        engine: The first model and how it decodes.
        stage1: Data set folder of stage 1 that every round is merged with; None merges nothing.
        rounds: How many.
        samples: Trajectories per problem.
        select: What is kept of them.
        column: Column of the problem.
        answer_column: Column of the reference answer.
        raw: Encode problems as they are, without the chat template.
        think: Let the response start after "<think>".
        format: Of the data sets; that of stage 1.
        grader: "math" is math-verify; "exact" compares the boxed text.
        grade_workers: Grading processes.
        concurrency: Trajectories in flight.
        train_config: YAML file of `threadweaver sft`; needed for more than one round.
        train_last: Train after the last round too.
        base: Model that each round trains; None: the first one.
        train_command: The training, {config}, {base}, {data} and {out} filled in; for example with accelerate launch.
    """

    problems: Annotated[Path, tyro.conf.Positional]
    out: Path
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")]
    stage1: Path | None = None
    rounds: int = 1
    samples: int = 4
    select: SelectOptions = field(default_factory=SelectOptions)
    column: str = "prompt"
    answer_column: str = "answer"
    raw: bool = False
    think: bool = False
    format: Format = "messages"
    grader: Literal["math", "exact"] = "math"
    grade_workers: int = 4
    concurrency: int = 256
    train_config: Path | None = None
    train_last: bool = False
    base: str | None = None
    train_command: str = TRAIN

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        trains = self.rounds > 1 or self.train_last
        if trains and "{config}" in self.train_command and self.train_config is None:
            raise ValueError("train_config is missing; a round that trains needs the YAML file of `threadweaver sft`")
        if self.rounds > 1 and self.engine.base_url:
            raise ValueError(
                "rounds must be 1 with base_url: servers hold one model. Train, serve the new model, and run the next "
                "round as a command of its own"
            )


@dataclass(frozen=True)
class RoundResult:
    """What one round gave.

    Attributes:
        number: From 1.
        trajectories: Decoded.
        failed: Lost to the engine.
        kept: Chosen.
        rows: Rows of the data set, stage 1 included.
        format_correctness: Share of trajectories that are well-formed without force.
        accuracy: Share whose answer is right, among those.
        dropped: The others by reason.
        examples: Names of the first of each reason.
        model: Folder of the trained model, "" if it was not trained.
    """

    number: int
    trajectories: int
    failed: int
    kept: int
    rows: int
    format_correctness: float
    accuracy: float
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    model: str = ""

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items())) or "none"
        return (
            f"round {self.number}: {self.trajectories} trajectories, format {self.format_correctness:.1%}, right "
            f"{self.accuracy:.1%} of those, {self.kept} kept, {self.rows} rows; left out: {dropped}"
        )


def self_train_rounds(
    options: SelfTrainOptions,
    *,
    make_engine: Callable[[str], Engine] | None = None,
    train: Callable[[str, Path, Path], None] | None = None,
    on_round: Callable[[RoundResult], None] | None = None,
) -> list[RoundResult]:
    """Run the rounds, or go on with them.

    Args:
        options: The rounds.
        make_engine: Model -> engine that decodes instead of the one that the options describe.
        train: (base model, data set folder, output folder) -> trains; instead of `train_command`.
        on_round: Called after every round.

    Raises:
        DatagenError: A problem has no answer, a round kept nothing, or training failed.
        RolloutFileError: A folder is of other settings.
    """
    results, model = [], options.engine.model
    for number in range(1, options.rounds + 1):
        folder = options.out / f"round-{number}"
        kept = folder / "round.json"
        trains = number < options.rounds or options.train_last
        if kept.exists():
            result = RoundResult(**json.loads(kept.read_text(encoding="utf-8")))
        else:
            result = _round(number, folder, replace(options.engine, model=model), options, make_engine)
        if trains and not result.model:
            base = options.base or options.engine.model
            (train or (lambda *job: _train(options, *job)))(base, folder / "dataset", folder / "model")
            result = replace(result, model=str(folder / "model"))
        kept.write_text(json.dumps(vars(result), indent=1) + "\n", encoding="utf-8")
        results.append(result)
        if on_round is not None:
            on_round(result)
        model = result.model or model
    return results


def _round(
    number: int,
    folder: Path,
    engine: EngineOptions,
    options: SelfTrainOptions,
    make_engine: Callable[[str], Engine] | None,
) -> RoundResult:
    path = folder / "trajectories.jsonl"
    for place, row in enumerate(iter_rows(options.problems, (options.column,)), 1):
        if row.get(options.answer_column) is None:  # said now, not when everything is decoded
            raise DatagenError(
                f"{options.problems}, row {place} has no answer in {options.answer_column!r}, its columns are "
                f"{', '.join(row)}; set answer_column, or drop the row"
            )
    summary = run_rollout(
        RolloutOptions(
            options.problems,
            path,
            engine,
            column=options.column,
            raw=options.raw,
            think=options.think,
            samples=options.samples,
            concurrency=options.concurrency,
            units=False,
        ),
        None if make_engine is None else make_engine(engine.model),
    )
    end = load_tokenizer(engine.model).eos_token or ""
    candidates: dict[str, Candidate] = {}
    dropped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    grader = make_grader(options.grader, options.grade_workers)
    try:
        for row, verdict in judge(_trajectories(path, options), grader, end=end):
            if isinstance(verdict, Candidate):
                candidates[verdict.key] = verdict
            else:
                note(dropped, examples, verdict, key_of(row))
    finally:
        grader.close()
    chosen, surplus = balance(list(candidates.values()), **vars(options.select))
    bad = sum(dropped[reason] for reason in ("not_finished", "forced_closer", "format"))
    wrong = sum(dropped[reason] for reason in ("wrong_answer", "ungraded"))
    total = len(candidates) + sum(dropped.values())
    for key, reason in surplus.items():
        note(dropped, examples, reason, key)
    if not chosen:
        raise DatagenError(
            f"round {number} kept none of {total} trajectories ({', '.join(f'{n} {r}' for r, n in dropped.items())}); "
            "train the model on stage 1 first, or look at the trajectories with `threadweaver inspect`"
        )

    def rows() -> Iterator[dict[str, Any]]:
        for row in _trajectories(path, options):
            if key_of(row) in chosen:
                found = training_row(row, candidates[key_of(row)], end)
                yield dataset_row(
                    options.format,
                    prompt=found["prompt"],
                    text=(THINK if options.think else "") + found["text"],
                    id=found["id"],
                    answer=found["answer"],
                    source=f"self_training_{number}",
                    kind="forkjoin" if candidates[found["id"]].forked else "sequential",
                    acceleration=found["acceleration"],
                    blocks=row["forks"],
                    threads=row["forked_threads"],
                )

    merged, count = rows(), len(chosen)
    if options.stage1 is not None:
        merged, count = chain(read_dataset(options.stage1, options.format), merged), count + count_rows(options.stage1)
    write_parquet(merged, count, folder / "dataset", MixOptions(format=options.format))
    well_formed = total - bad
    return RoundResult(
        number=number,
        trajectories=total,
        failed=summary.failed,
        kept=len(chosen),
        rows=count,
        format_correctness=well_formed / max(total, 1),
        accuracy=(well_formed - wrong) / max(well_formed, 1),
        dropped=dict(dropped),
        examples=examples,
    )


def _trajectories(path: Path, options: SelfTrainOptions) -> Iterator[dict[str, Any]]:
    for row in read_trajectories(path):
        yield row | {"answer": row[options.answer_column]}


def _train(options: SelfTrainOptions, base: str, data: Path, out: Path) -> None:
    values = {"python": sys.executable, "config": options.train_config, "base": base, "data": data, "out": out}
    command = [word.format(**values) for word in shlex.split(options.train_command)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise DatagenError(f"training failed with status {done.returncode}: {shlex.join(command)}")
