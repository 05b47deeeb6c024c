"""A stage: a folder named by what it depends on, and a stage.json that says it is done.

    with the same settings a second run reads every stage.json; with others it makes new folders beside the old ones,
    and stages that do not depend on the difference are read, not made again; a stage that another process works at is
    waited for (its folder is locked)

Tests: tests/recipes/pipelines/test_reproduce_stages.py.
"""

import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tw_recipes.pipelines.checkpoints import Checkpoints, OutOfTime
from tw_recipes.pipelines.reproduce.settings import fingerprint

OUT_OF_TIME = 3
"""Exit status of a run that stopped because its time was used up."""

_TIMES = ("began", "seconds", "cpu_seconds")

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
        began: When the last run that worked at it began, in seconds since 1970.
        seconds: Its wall clock from there.
        cpu_seconds: Time of the process on the CPU meanwhile.
    """

    name: str
    key: str
    folder: Path
    figures: dict[str, Any]
    began: float
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
        """The stage, made now unless it is there or another process makes it.

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
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
            if not file.is_file():
                if self.deadline is not None and time.monotonic() > self.deadline:
                    raise OutOfTime(f"the time is used up before the stage {name}; run the same command again to go on")
                self._make(name, dict(depends_on), work, file)
        content = json.loads(file.read_text(encoding="utf-8"))
        return Stage(name, key, folder, **{part: content[part] for part in ("figures", *_TIMES)})

    def _make(self, name: str, depends_on: dict[str, Any], work: Work, file: Path) -> None:
        clock, began, busy = time.time(), time.perf_counter(), time.process_time()
        try:
            with self.around(name):
                figures = work(file.parent)
        except OutOfTime:
            raise
        except Exception as error:
            raise StageError(f"stage {name} failed: {type(error).__name__}: {error}") from error
        took = (clock, time.perf_counter() - began, time.process_time() - busy)
        times = {part: round(value, 2) for part, value in zip(_TIMES, took, strict=True)}
        content = {"name": name, "depends_on": depends_on, "figures": figures, **times}
        half = file.with_suffix(".part")
        half.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        half.replace(file)  # a kill leaves a stage done or not done


def seconds_in(stages: Iterable[Stage]) -> float:
    """Seconds in which at least one of the stages was being made."""
    total, until = 0.0, 0.0
    for stage in sorted(stages, key=lambda stage: stage.began):
        ended = stage.began + stage.seconds
        total += max(0.0, ended - max(stage.began, until))
        until = max(until, ended)
    return total
