"""Training that can be cut short: checkpoints by the clock, a deadline, and going on from the last one.

Tests: tests/recipes/pipelines/test_checkpoints.py.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


class OutOfTime(RuntimeError):
    """The time that a run may take is used up; what is done stays done."""


class Checkpoints(TrainerCallback):
    """Pass it as a callback, give `last` to `Trainer.train`, call `finish` when that returns.

    Args:
        folder: The trainer's output folder.
        deadline: `time.monotonic()` after which training stops at the end of a step; None: never.
        every: Seconds between checkpoints.
    """

    def __init__(self, folder: Path, *, deadline: float | None = None, every: float = 120.0):
        self.folder, self.deadline, self.every = folder, deadline, every
        self.saved = time.monotonic()
        self.stopped_at = 0

    @property
    def last(self) -> str | None:
        """The newest checkpoint of an earlier run, None without one."""
        return get_last_checkpoint(str(self.folder)) if self.folder.is_dir() else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where it is time to."""
        if state.global_step >= state.max_steps:
            return
        now = time.monotonic()
        if self.deadline is not None and now > self.deadline:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step
        elif now - self.saved > self.every:
            control.should_save = True
            self.saved = now

    def finish(self) -> None:
        """Remove the checkpoints of a training that is done.

        Raises:
            OutOfTime: It is not; the message says at which step it stopped.
        """
        if self.stopped_at:
            raise OutOfTime(f"the time is used up at step {self.stopped_at}; run the same command again to go on")
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
