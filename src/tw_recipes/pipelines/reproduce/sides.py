"""The stages of one side, sequential or fork/join, from the common start to the evaluation of its last model.

    sft ─► mixed ─► self_training_1 … ─► rl     each followed by a stage that decodes and grades held-out problems
                                          └─► wall_clock

Both sides see the same problems in the same number of steps. As a program this module trains one side on one thread, so
that two sides use two cores, and evaluates whatever is trained; every result is in the stages' files.
Tests: tests/recipes/pipelines/test_reproduce.py.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, set_seed

from tw_recipes.attention import uninstall
from tw_recipes.datagen.self_training import self_train_select
from tw_recipes.decoding.engine import Sampling
from tw_recipes.pipelines.checkpoints import OutOfTime
from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.reproduce import measure, rows
from tw_recipes.pipelines.reproduce.reinforcement import RL_CURVE, grpo_trainer
from tw_recipes.pipelines.reproduce.rows import Side
from tw_recipes.pipelines.reproduce.settings import Settings
from tw_recipes.pipelines.reproduce.stages import OUT_OF_TIME, Stage, StageError, Stages, told
from tw_recipes.pipelines.training import Trained, packing_processes, train
from tw_recipes.tasks.model import tiny_model


@dataclass(frozen=True)
class SideResult:
    """The stages of one side.

    Attributes:
        trained: Stages that trained a model, in order: sft, mixed, self_training_…, rl.
        evaluated: The evaluation of each of them.
        clock: Wall clock of the last one.
    """

    trained: tuple[Stage, ...]
    evaluated: tuple[Stage, ...]
    clock: Stage

    @property
    def supervised(self) -> tuple[Stage, ...]:
        """Those of supervised training."""
        return tuple(stage for stage in self.trained if stage not in self.reinforced)

    @property
    def reinforced(self) -> tuple[Stage, ...]:
        """The one of reinforcement learning, if there is one."""
        return tuple(stage for stage in self.trained if stage.name.endswith("-rl"))

    @property
    def all(self) -> tuple[Stage, ...]:
        """Every stage of the side."""
        return (*self.trained, *self.evaluated, self.clock)


class Worker:
    """Makes stages with one set of settings; seeds this process and sets its number of threads.

    Args:
        settings: Of the run.
        out: Folder of the stages.
        minutes: After so many minutes from now no stage starts; None: no bound.
        threads: Of torch on the CPU; None: as the settings say.
    """

    def __init__(self, settings: Settings, out: Path, *, minutes: float | None = None, threads: int | None = None):
        torch.set_num_threads(threads or settings.threads)
        set_seed(settings.seed)
        self.settings, self.stages = settings, Stages(out, minutes=minutes, around=told)
        self.task = settings.make_task()
        self.tokenizer = self.task.tokenizer()
        self.base = {
            "task": settings.task,
            "seed": settings.seed,
            "device": settings.device,
            "model": asdict(settings.model),
        } | ({"compiled": True} if settings.training.compiled else {})
        self._held_out: list[dict[str, str]] | None = None

    @property
    def held_out(self) -> list[dict[str, str]]:
        """Problems that no training set holds."""
        if self._held_out is None:
            self._held_out = rows.held_out_problems(self.settings)
        return self._held_out

    def start(self) -> Stage:
        """The common start of both sides: random weights, trained on sequential solutions if the settings say so."""
        settings, steps = self.settings, self.settings.training.start_steps

        def work(folder: Path) -> dict[str, Any]:
            model = tiny_model(self.tokenizer, seed=settings.seed, **asdict(settings.model))
            done: dict[str, Any] = {"parameters": model.num_parameters()}
            if steps:
                model = model.to(settings.device)
                done |= self._train(model, rows.training_rows(settings, "sequential", first=0, steps=steps), folder)
            return self._save(model, folder) | done

        depends = {**self.base, "batch": settings.training.batch, "steps": steps}
        return self.stages.run("start", depends, work)

    def side(self, side: Side) -> SideResult:
        """Every stage of one side."""
        trained = tuple(self._trained(side))
        evaluated = tuple(self._evaluation(side, stage) for stage in trained)
        return SideResult(trained, evaluated, self._clock(side, trained[-1]))

    def share(self, side: Side) -> None:
        """Train one side beside a process that trains the other, and evaluate what is not evaluated yet of both."""
        for stage in reversed(list(self._trained(side))):
            self._evaluation(side, stage)
        (other,) = set(rows.SIDES) - {side}
        for stage in self._trained(other):
            self._evaluation(other, stage)

    def _trained(self, side: Side) -> Iterator[Stage]:
        """The stages that train one side, each when it is done."""
        stage = self._sft(side)
        yield stage
        if self.settings.mixes:
            stage = self._mixed(side, stage)
            yield stage
        for round in range(self.settings.self_training.rounds):
            stage = self._self_training(side, round, stage)
            yield stage
        if self.settings.reinforcement.steps:
            yield self._reinforcement(side, stage)

    def _sft(self, side: Side) -> Stage:
        settings, training = self.settings, self.settings.training
        start = self.start()
        lr = training.second_lr if training.start_steps else 1.0

        def work(folder: Path) -> dict[str, Any]:
            made = rows.training_rows(
                settings,
                side,
                first=training.start_steps,
                steps=training.steps,
                sequential_share=training.retained_share,
            )
            return self._go_on(side, start, made, folder, lr)

        depends = {"start": start.key, "steps": training.steps, "lr": lr}
        if side == "forkjoin":
            depends |= {"nested": settings.nested, "share": training.retained_share, "leaky": training.leaky_loss}
        return self.stages.run(f"{side}-sft", depends, work)

    def _mixed(self, side: Side, before: Stage) -> Stage:
        """More of the same for the sequential side; the fork/join side learns to solve problems in both ways."""
        settings, training = self.settings, self.settings.training

        def work(folder: Path) -> dict[str, Any]:
            made = rows.training_rows(
                settings,
                side,
                first=training.start_steps + training.steps,
                steps=training.mixed_steps,
                sequential_share=training.sequential_share,
            )
            return self._go_on(side, before, made, folder, training.mixed_lr)

        depends = {"before": before.key, "steps": training.mixed_steps, "lr": training.mixed_lr}
        if side == "forkjoin":
            depends |= {"share": training.sequential_share, "leaky": training.leaky_loss}
        return self.stages.run(f"{side}-mixed", depends, work)

    def _self_training(self, side: Side, round: int, before: Stage) -> Stage:
        settings, options = self.settings, self.settings.self_training

        def work(folder: Path) -> dict[str, Any]:
            problems = rows.self_training_problems(settings, round)
            found = measure.decode(
                self._load(before, decode=True),
                self.tokenizer,
                problems,
                folder / "trajectories.jsonl",
                limits=self._limits(side),
                sampling=Sampling(temperature=options.temperature, seed=settings.seed + round),
            )
            kept = self_train_select(
                found,
                self.task.grader(),
                end=self.tokenizer.eos_token,
                max_sequential_share=options.sequential_share if side == "forkjoin" else 1.0,
            )
            # Where nothing is fit to be kept the model stays as it is: "kept" and "steps" in the report say so.
            count = options.steps * settings.training.batch if kept.rows else 0
            chosen = rows.cycled(kept.rows, count, settings.seed)
            shares = {
                "decoded": len(found),
                "kept": len(kept.rows),
                "dropped": dict(kept.dropped),
                "format_correctness": sum(t["format_ok"] and t["status"] == "done" for t in found) / len(found),
            }
            return self._go_on(side, before, chosen, folder, options.lr) | shares

        depends = {"before": before.key, **{k: v for k, v in asdict(options).items() if k != "rounds"}}
        if side == "forkjoin":
            depends["leaky"] = settings.training.leaky_loss
        return self.stages.run(f"{side}-self_training_{round + 1}", depends, work)

    def _reinforcement(self, side: Side, before: Stage) -> Stage:
        settings, options = self.settings, self.settings.reinforcement

        def work(folder: Path) -> dict[str, Any]:
            model = self._load(before)
            problems = rows.reinforcement_problems(settings)
            trainer = grpo_trainer(
                settings,
                model,
                problems,
                folder / "trainer",
                forking=side == "forkjoin",
                tokenizer=self.tokenizer,
                grader=self.task.grader(),
                limits=self._limits(side),
                # What a trainer wraps in autocast decodes slower than a copy in bfloat16, as evaluation uses it.
                copied=None if settings.device == "cpu" else self._load(before, decode=True),
            )
            checkpoints = self.stages.checkpoints(folder / "trainer")
            trainer.add_callback(checkpoints)
            with contextlib.redirect_stdout(None):
                trainer.train(resume_from_checkpoint=checkpoints.last)
            uninstall(model)
            checkpoints.finish()
            curve = {
                name: [entry[key] for entry in trainer.state.log_history if key in entry]
                for name, key in RL_CURVE.items()
            }
            return self._save(model, folder) | {"steps": trainer.state.global_step, "curve": curve}

        depends = {"before": before.key, **asdict(options)}
        if side == "sequential":  # no forks, so no bonus; the ablation is one of P-GRPO
            depends = {k: v for k, v in depends.items() if k not in ("rho", "eta_max", "std_normalisation")}
        return self.stages.run(f"{side}-rl", depends, work)

    def _evaluation(self, side: Side, stage: Stage) -> Stage:
        options = self.settings.evaluation
        ends = stage.name in (f"{side}-sft", f"{side}-{self.settings.last}")
        count = options.problems if ends else options.between or options.problems

        def work(folder: Path) -> dict[str, Any]:
            problems = self.held_out[:count]
            found = measure.decode(
                self._load(stage, decode=True),
                self.tokenizer,
                problems,
                folder / "trajectories.jsonl",
                limits=self._limits(side),
                sampling=Sampling(options.temperature, options.top_p, seed=self.settings.seed),
            )
            return measure.figures(found, problems, self.task.grader())

        depends = {
            "model": stage.key,
            "problems": count,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        return self.stages.run(f"{stage.name}-evaluation", depends, work)

    def _clock(self, side: Side, stage: Stage) -> Stage:
        options = self.settings.evaluation

        def work(folder: Path) -> dict[str, Any]:
            return {
                "threads": torch.get_num_threads(),
                "seconds_per_problem": measure.wall_clock(
                    self._load(stage, decode=True),
                    self.tokenizer,
                    self.held_out,
                    limits=self._limits(side),
                    batches=options.batches,
                    timed=options.timed,
                ),
            }

        return self.stages.run(
            f"{side}-wall_clock", {"model": stage.key, "batches": options.batches, "timed": options.timed}, work
        )

    def _limits(self, side: Side) -> Any:
        return measure.limits_for(self.held_out[:64], self.tokenizer, fork=side == "forkjoin")

    def _go_on(self, side: Side, before: Stage, made: Sequence[Mapping[str, Any]], folder: Path, lr: float) -> Any:
        """Train the model of an earlier stage on rows and save it."""
        model = self._load(before)
        done = self._train(model, made, folder, tries=side == "forkjoin", lr_scale=lr)
        return self._save(model, folder) | done

    def _train(
        self,
        model: Any,
        made: Sequence[Mapping[str, Any]],
        folder: Path,
        *,
        tries: bool = False,
        lr_scale: float = 1.0,
    ) -> dict[str, Any]:
        settings = self.settings
        if not made:
            return Trained(0, 0, 0, [])._asdict()
        # On a GPU plain texts too are tries of one branch: packed without padding, by the same kernel.
        tries = tries or settings.device != "cpu"
        plain = [{"prompt": row["prompt"], "text": row["text"]} for row in made]
        chosen: Sequence[Mapping[str, Any]] | Dataset = plain
        if settings.training.leaky_loss and any("<Parallel>" in row["text"] for row in plain):
            chosen = rows.leaky_dataset(plain, self.tokenizer, packing_processes(len(plain), settings.device))
        done: Trained = train(
            model,
            self.tokenizer,
            chosen,
            tries=tries,
            folder=folder / "trainer",
            seed=settings.seed,
            lr_scale=lr_scale,
            batch=settings.training.batch,
            compiled=settings.training.compiled,
            checkpoints=self.stages.checkpoints(folder / "trainer"),
        )
        return done._asdict()

    def _load(self, stage: Stage, *, decode: bool = False) -> Any:
        """The model of a stage; for decoding on a GPU in bfloat16, the type that it was trained in."""
        dtype = torch.bfloat16 if decode and self.settings.device != "cpu" else torch.float32
        if self.settings.device != "cpu":
            # Trainers and graphs of earlier stages lie in cycles until they are collected.
            gc.collect()
            torch.cuda.empty_cache()
        model = AutoModelForCausalLM.from_pretrained(stage.model, dtype=dtype)
        return model.to(self.settings.device).eval()

    def _save(self, model: Any, folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        return {}


def main(argv: Sequence[str]) -> int:
    """`SETTINGS.json OUT SIDE THREADS [MINUTES]`: see `Worker.share`. Started by `reproduce`, not by users."""
    settings = Settings.from_json(json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    side = next(name for name in rows.SIDES if name == argv[2])
    minutes = float(argv[4]) if len(argv) > 4 else None
    try:
        quietly(Worker(settings, Path(argv[1]), minutes=minutes, threads=int(argv[3])).share)(side)
    except OutOfTime as pause:
        print(pause, file=sys.stderr)
        return OUT_OF_TIME
    except StageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
