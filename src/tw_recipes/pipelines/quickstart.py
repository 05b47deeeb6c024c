"""`threadweaver quickstart`: the whole path on a CPU in minutes, on a task that is made in the process.

    data      problems with sequential and fork/join solutions -> DIR/data/*.jsonl, read back row by row
    start     a tiny Qwen3 from scratch on sequential solutions (stock TRL SFTTrainer)
    train     from those weights, the same number of steps on the same problems, twice:
              sequential solutions (SFTTrainer) | fork/join solutions as packed tries (TrieSFTTrainer)
    decode    held-out problems: one call a response | the fork/join state machine
    report    DIR/results.json, DIR/report.md, the models in DIR/sequential and DIR/forkjoin

Both models see the same problems in the same number of steps; the fork/join model computes more tokens a step, which
the report says. Tests: tests/recipes/pipelines.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tw_recipes.data import fork_join_text, read_rows, write_jsonl
from tw_recipes.pipelines import report
from tw_recipes.pipelines.comparison import compare, measure
from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.training import BATCH, OnStep, Trained, train
from tw_recipes.tasks import get_task
from tw_recipes.tasks.model import tiny_model

COLUMNS = ("prompt", "text", "answer")
START_SHARE = 13 / 24  # of the steps go to the common start
SECOND_LR = 0.75  # of the first stage's learning rates
SHORT_RUN = 100  # fewer steps check that everything runs; they are measured on few problems


class StageError(RuntimeError):
    """A stage of the run failed; the message names it."""


def quickstart(
    out: Path = Path("out/quickstart"),
    *,
    seed: int = 0,
    steps: int = 1200,
    problems: int | None = None,
    skip_bad: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Make data, train both models, decode held-out problems, compare; a few minutes on two CPU cores.

    Args:
        out: Folder for data, models and results. Files of an earlier run are overwritten.
        seed: Of problems, weights and training.
        steps: Optimizer steps of each model, at least 3; 13 of 24 are the common sequential start.
        problems: Held-out problems. Default: 200, or 24 when there are fewer than 100 steps.
        skip_bad: Go on without corrupted data set rows, counted and listed, instead of stopping.
        threads: CPU threads. Default: torch's own choice, at most 4.

    Returns:
        What DIR/results.json holds.

    Raises:
        StageError: A stage failed.
        ValueError: An argument is out of range.
    """
    if steps < 3:
        raise ValueError(f"steps must be at least 3 (one of each kind of training), got {steps}")
    if problems is None:
        problems = 200 if steps >= SHORT_RUN else 24
    if problems < 1:
        raise ValueError(f"problems must be at least 1, got {problems}")
    torch.set_num_threads(threads or min(torch.get_num_threads(), 4))
    set_seed(seed)
    run = _Run(out, Console(stderr=True))
    first = round(steps * START_SHARE)
    second = steps - first
    task = get_task("products")
    tokenizer = task.tokenizer()

    with run.stage("data"):
        made = {
            "sequential": task.rows(steps * BATCH, seed=seed, style="sequential"),
            "forkjoin": task.rows(second * BATCH, seed=seed, style="forkjoin", offset=first * BATCH),
            "test": task.rows(problems, seed=seed, split="test"),
        }
        data, skipped = {}, []
        for name, rows in made.items():
            path = write_jsonl(out / "data" / f"{name}.jsonl", rows)
            data[name], bad = read_rows(path, COLUMNS, skip_bad=skip_bad, check=fork_join_text)
            skipped += [str(row) for row in bad]
    start_rows, more_rows = data["sequential"][: first * BATCH], data["sequential"][first * BATCH :]

    def fit(model: Any, rows: list[dict[str, str]], name: str, *, tries: bool = False, scale: float = 1.0) -> Trained:
        whole = rows[: len(rows) // BATCH * BATCH]
        with run.bar(f"train {name}", len(whole) // BATCH) as on_step:
            return train(
                model, tokenizer, whole, tries=tries, folder=out / "trainer", seed=seed, lr_scale=scale, on_step=on_step
            )

    trained: dict[str, list[Trained]] = {}
    with run.stage("train_start"):
        model = tiny_model(tokenizer, seed=seed)
        common = fit(model, start_rows, "common start (sequential)")
        _save(model, tokenizer, out / "start")
    with run.stage("train_sequential"):
        model = AutoModelForCausalLM.from_pretrained(out / "start")
        trained["sequential"] = [common, fit(model, more_rows, "sequential", scale=SECOND_LR)]
        _save(model, tokenizer, out / "sequential")
    with run.stage("train_forkjoin"):
        model = AutoModelForCausalLM.from_pretrained(out / "start")
        trained["forkjoin"] = [common, fit(model, data["forkjoin"], "fork/join", tries=True, scale=SECOND_LR)]
        _save(model, tokenizer, out / "forkjoin")

    measured = {}
    longest = max(len(tokenizer.encode(row["text"])) for row in made["test"][:8])
    for name, fork in (("sequential", False), ("forkjoin", True)):
        with run.stage(f"decode_{name}"), run.bar(f"decode {name}", len(data["test"])) as on_done:
            # From disk: what is measured is what was saved.
            measured[name] = measure(
                AutoModelForCausalLM.from_pretrained(out / name).eval(),
                AutoTokenizer.from_pretrained(out / name),
                data["test"],
                task.grader(),
                fork=fork,
                single=min(10 if steps >= SHORT_RUN else 2, problems),
                max_total_tokens=longest + 32,
                max_thread_tokens=longest // 3,
                on_done=on_done,
            )

    with run.stage("report"):
        results: dict[str, Any] = compare(measured["sequential"], measured["forkjoin"])
        for name, stages in trained.items():
            results[name]["training"] = report.training_figures(stages)
        results["meta"] = {
            "seed": seed,
            "versions": report.versions(),
            "seconds": run.seconds,
            "steps": steps,
            "problems": problems,
            "threads": torch.get_num_threads(),
            "task": task.name,
            "skipped_rows": skipped,
        }
        examples = _examples(data["test"], measured)
        report.write(out, results, examples)
    report.show(results, Console())
    return results


def _examples(rows: Sequence[dict[str, str]], measured: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The first problem with both responses, and the first that fork/join got wrong."""
    picked = [0, *np.flatnonzero(~measured["forkjoin"].correct)[:1].tolist()]
    return [
        (rows[i]["prompt"], measured["sequential"].texts[i], measured["forkjoin"].texts[i])
        for i in dict.fromkeys(picked)
    ]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Run:
    """Stages with their wall clock, and progress bars on the terminal."""

    def __init__(self, out: Path, console: Console):
        out.mkdir(parents=True, exist_ok=True)
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            raise StageError(f"stage {name} failed: {type(error).__name__}: {error}") from error
        finally:
            self.seconds[name] = round(time.perf_counter() - began, 2)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[OnStep]:
        columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[figures]}"), console=self.console) as progress:
            handle = progress.add_task(title, total=total, figures="")
            yield lambda done, figures: progress.update(handle, completed=done, figures=figures)


def main(argv: Sequence[str]) -> int:
    """Run `quickstart` from flags; 0 when every stage ran, 1 otherwise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        quietly(tyro.cli)(quickstart, args=list(argv), prog="threadweaver quickstart", description=quickstart.__doc__)
    except (StageError, ValueError) as error:
        print(f"threadweaver quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
