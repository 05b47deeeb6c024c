"""A stage: a folder named by what it depends on, and a stage.json that says it is done.

    with the same settings a second run reads every stage.json; with others it makes new folders beside the old ones,
    and stages that do not depend on the difference are read, not made again

Tests: tests/recipes/pipelines/test_reproduce_stages.py.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tw_recipes.pipelines.checkpoints import Checkpoints, OutOfTime
from tw_recipes.pipelines.reproduce.settings import fingerprint

OUT_OF_TIME = 3
"""Exit status of a run that stopped because its time was used up."""

Work = Callable[[Path], dict[str, Any]]
"""Does the work of a stage in its folder and returns the figures."""


class StageError(RuntimeError):
    """A stage failed; the message names it."""


@contextmanager
def told(name: str) -> Iterator[None]:
    """Say on stderr when a stage starts and how long it took."""
    began = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    yield
    print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stage:
    """A stage that is done.

    Attributes:
        name: What it is.
        key: Fingerprint of everything that it depends on.
        folder: Its files.
        figures: What it found.
        seconds: Its wall clock when it was made; of the last run that worked at it.
        cpu_seconds: Time of the process on the CPU meanwhile: the wall clock of one thread on a machine that is free.
    """

    name: str
    key: str
    folder: Path
    figures: dict[str, Any]
    seconds: float
    cpu_seconds: float

    @property
    def model(self) -> Path:
        """Where a stage that trains leaves its model."""
        return self.folder / "model"


class Stages:
    """The stages of one output folder.

    Args:
        out: The folder.
        minutes: After so many minutes from now no stage starts, and training stops at a checkpoint. None: no bound.
        around: Called with the stage's name, entered while it works (progress display).
    """

    def __init__(
        self,
        out: Path,
        *,
        minutes: float | None = None,
        around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ):
        self.out, self.around = out, around
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def minutes_left(self) -> float | None:
        """Minutes until no stage starts any more; None without a bound."""
        return None if self.deadline is None else (self.deadline - time.monotonic()) / 60

    def checkpoints(self, folder: Path) -> Checkpoints:
        """For a trainer with that output folder: training stops at the deadline and goes on in the next run."""
        return Checkpoints(folder, deadline=self.deadline)

    def run(self, name: str, depends_on: Mapping[str, Any], work: Work) -> Stage:
        """The stage, made now unless it is there.

        Args:
            name: Of the stage; its folder is "<name>-<key>".
            depends_on: Settings, and keys of earlier stages.
            work: Makes it.

        Raises:
            StageError: `work` raised.
            OutOfTime: The time is used up, before the stage or within it.
        """
        key = fingerprint({"name": name, "depends_on": dict(depends_on)})
        folder = self.out / "stages" / f"{name}-{key}"
        file = folder / "stage.json"
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            return Stage(name, key, folder, content["figures"], content["seconds"], content["cpu_seconds"])
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime(f"the time is used up before the stage {name}; run the same command again to go on")
        folder.mkdir(parents=True, exist_ok=True)
        began, busy = time.perf_counter(), time.process_time()
        try:
            with self.around(name):
                figures = work(folder)
        except OutOfTime:
            raise
        except Exception as error:
            raise StageError(f"stage {name} failed: {type(error).__name__}: {error}") from error
        took = {
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_seconds": round(time.process_time() - busy, 2),
        }
        content = {"name": name, "depends_on": dict(depends_on), "figures": figures, **took}
        half = file.with_suffix(".part")
        half.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        half.replace(file)  # a kill leaves a stage done or not done
        return Stage(name, key, folder, json.loads(json.dumps(figures)), **took)
