"""`threadweaver reproduce`: the whole experiment as one function and one command.

    threadweaver reproduce --preset cpu                        two CPU cores, minutes
    threadweaver reproduce --preset h100 --minutes 8           one GPU; the same command again goes on
    threadweaver reproduce --std-normalisation                 an ablation: shares every stage it does not change

Exit status: 0 the report is there, 1 a stage failed or an argument is bad, 3 the time is used up (run it again).
Tests: tests/recipes/pipelines/test_reproduce.py.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tw_recipes.pipelines.checkpoints import OutOfTime
from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.reproduce import report
from tw_recipes.pipelines.reproduce.rows import SIDES
from tw_recipes.pipelines.reproduce.settings import PRESETS, Settings
from tw_recipes.pipelines.reproduce.sides import Worker
from tw_recipes.pipelines.reproduce.stages import OUT_OF_TIME, StageError


def reproduce(settings: Settings, out: Path = Path("out/reproduce"), *, minutes: float | None = None) -> dict[str, Any]:
    """Make every stage that is missing, then the report.

    Args:
        settings: See `PRESETS` and `settings_of`.
        out: Folder of stages, models and report. Several runs may share it: a stage's folder is named by what it
            depends on.
        minutes: No stage starts later than this, and training stops at a checkpoint.

    Returns:
        What OUT/results.json holds.

    Raises:
        StageError: A stage failed.
        OutOfTime: The time is used up; call it again to go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    worker = Worker(settings, out, minutes=minutes)
    start = worker.start()
    if settings.at_once:
        _both_at_once(settings, out, worker.stages.minutes_left)
        torch.set_num_threads(1)  # the wall clocks: one token of a tiny model is slower on two
    sides = {side: worker.side(side) for side in SIDES}
    results = report.collect(settings, start, sides)
    report.write(out, results, sides, worker.held_out)
    return results


def settings_of(
    preset: str,
    *,
    task: str | None = None,
    seed: int = 0,
    rounds: int | None = None,
    rl_steps: int | None = None,
    rho: float | None = None,
    std_normalisation: bool = False,
    leaky_loss: bool = False,
    nested: bool = False,
    steps: int | None = None,
    mixed_steps: int | None = None,
    compiled: bool = False,
    clocks: bool = True,
    scale: float = 1.0,
    threads: int | None = None,
) -> Settings:
    """A preset with the flags of `threadweaver reproduce` applied; see there. `clocks=False` measures no wall clock.

    Raises:
        ValueError: A flag is out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {scale}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}; leave it out for the preset's")
    for name, count in (("rl_steps", rl_steps), ("mixed_steps", mixed_steps)):
        if count is not None and count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}; 0 leaves the stage out")
    base = PRESETS[preset]

    def part(count: int, least: int = 1) -> int:
        return count if scale == 1.0 else max(least, math.ceil(count * scale)) if count else 0

    training, own, rl, evaluation = base.training, base.self_training, base.reinforcement, base.evaluation
    return replace(
        base,
        task=task or base.task,
        nested=nested,
        seed=seed,
        threads=threads or base.threads,
        training=replace(
            training,
            start_steps=part(training.start_steps),
            steps=part(training.steps) if steps is None else steps,
            mixed_steps=part(training.mixed_steps) if mixed_steps is None else mixed_steps,
            leaky_loss=leaky_loss,
            compiled=compiled,
        ),
        self_training=replace(
            own, rounds=own.rounds if rounds is None else rounds, prompts=part(own.prompts, 2), steps=part(own.steps)
        ),
        reinforcement=replace(
            rl,
            steps=part(rl.steps, 2) if rl_steps is None else rl_steps,
            rho=rl.rho if rho is None else rho,
            std_normalisation=std_normalisation,
        ),
        evaluation=replace(
            evaluation,
            problems=part(evaluation.problems, 4),
            between=part(evaluation.between, 4) if evaluation.between else None,
            timed=part(evaluation.timed),
            batches=evaluation.batches if clocks else (),
        ),
    )


def _both_at_once(settings: Settings, out: Path, minutes: float | None) -> None:
    """One process a side, one thread each, for all but the wall clocks; their results are the stages' files."""
    file = out / "settings.json"
    file.write_text(json.dumps(settings.as_json(), indent=1) + "\n", encoding="utf-8")
    left = [] if minutes is None else [f"{minutes:.3f}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = {
        side: subprocess.Popen(
            [sys.executable, "-m", "tw_recipes.pipelines.reproduce.sides", str(file), str(out), side, "1", *left],
            env=environment,
        )
        for side in SIDES
    }
    try:
        codes = {side: process.wait() for side, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    if OUT_OF_TIME in codes.values():
        raise OutOfTime("the time is used up; run the same command again to go on")
    failed = [side for side, code in codes.items() if code]
    if failed:
        raise StageError(f"the side {' and '.join(failed)} failed; its message is above")


def run(
    out: Path = Path("out/reproduce"),
    *,
    preset: Literal["cpu", "h100"] = "cpu",
    task: str | None = None,
    seed: int = 0,
    rounds: int | None = None,
    rl_steps: int | None = None,
    rho: float | None = None,
    std_normalisation: bool = False,
    leaky_loss: bool = False,
    nested: bool = False,
    steps: int | None = None,
    mixed_steps: int | None = None,
    compiled: bool = False,
    minutes: float | None = None,
    scale: float = 1.0,
    threads: int | None = None,
) -> None:
    """Train, self-train, reinforce and compare both sides; see docs/reproduce.md.

    Args:
        out: Folder of stages and report.
        preset: cpu (two cores, minutes) or h100 (one GPU).
        task: products, multiply or adaptive. Default: the preset's.
        seed: Of everything.
        rounds: Rounds of self-training, 0, 1 or 2.
        rl_steps: Steps of reinforcement learning of each side; 0 leaves it out.
        rho: Weight of the acceleration in the reward; 0 rewards correctness alone.
        std_normalisation: Divide advantages by the standard deviation of the group.
        leaky_loss: Loss on injected headers and joined copies too, as the published code has it.
        nested: Fork/join solutions with blocks inside threads (task multiply).
        steps: Supervised steps of each side on its own solutions.
        mixed_steps: Steps between supervised training and what follows it; more of them train both sides further.
        compiled: Compile the layers for supervised training.
        minutes: Stop after so many minutes, in training at a checkpoint; the same command again goes on.
        scale: Share of all steps and problems, to try things out.
        threads: CPU threads of a process that works alone.
    """
    settings = settings_of(
        preset,
        task=task,
        seed=seed,
        rounds=rounds,
        rl_steps=rl_steps,
        rho=rho,
        std_normalisation=std_normalisation,
        leaky_loss=leaky_loss,
        nested=nested,
        steps=steps,
        mixed_steps=mixed_steps,
        compiled=compiled,
        scale=scale,
        threads=threads,
    )
    results = reproduce(settings, out, minutes=minutes)
    from rich.console import Console
    from rich.table import Table

    table = Table("", *report.NAMES.values(), title=f"reproduce: {settings.task}, seed {seed}")
    for row in report.summary_rows(results):
        table.add_row(*row)
    Console().print(table)
    print(f"{results['seconds']:.0f} s in all; {out / 'report.html'}")


def main(argv: Sequence[str]) -> int:
    """Run `reproduce` from flags; see the module docstring for the exit status."""
    import tyro

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        quietly(tyro.cli)(run, args=list(argv), prog="threadweaver reproduce", description=run.__doc__)
    except OutOfTime as pause:
        print(f"threadweaver reproduce: {pause}", file=sys.stderr)
        return OUT_OF_TIME
    except (StageError, ValueError, KeyError) as error:
        print(f"threadweaver reproduce: {error.args[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
