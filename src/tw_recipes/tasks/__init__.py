"""Synthetic reasoning tasks: problems, sequential and fork/join solutions of the same content, graders, tokenizers.

    task = get_task("products")
    rows = task.rows(1000, seed=0, split="train", style="forkjoin")      {"prompt", "text", "answer"}
    tokenizer, grader = task.tokenizer(), task.grader()

A task is deterministic in its arguments; a problem belongs to one split whatever the seed.
"""

from typing import Any, Protocol

from tw_recipes.tasks.products import Split, Style, SumOfProducts

__all__ = ["TASKS", "SumOfProducts", "Task", "get_task"]


class Task(Protocol):
    """What pipelines ask of a task."""

    name: str

    def rows(
        self, count: int, *, seed: int, split: Split = "train", style: Style = "forkjoin", offset: int = 0
    ) -> list[dict[str, str]]:
        """Data set rows {"prompt", "text", "answer"}."""

    def tokenizer(self) -> Any:
        """A tokenizer for every text of the task, the tags single tokens."""

    def grader(self) -> Any:
        """A `tw_recipes.evaluation.grading.Grader` that reads the response only."""


TASKS: dict[str, Task] = {task.name: task for task in (SumOfProducts(),)}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        KeyError: There is none; the message lists the names.
    """
    if name not in TASKS:
        raise KeyError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
