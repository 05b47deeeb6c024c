"""Synthetic reasoning tasks: problems, sequential and fork/join solutions of the same content, graders, tokenizers.

    products   a sum of four products; the products are threads                    (the quickstart)
    multiply   5 to 8 integers multiplied, as a chain or as a tree of threads      (the paper's public reproduction)
    adaptive   half of the problems decompose, half do not

    task = get_task("products")
    rows = task.rows(1000, seed=0, split="train", style="forkjoin")      {"prompt", "text", "answer", "difficulty"}
    tokenizer, grader = task.tokenizer(), task.grader()

A task is deterministic in its arguments; a problem belongs to one split whatever the seed.
"""

from dataclasses import replace
from typing import Any, Protocol

from tw_recipes.tasks.adaptive import SomeDecompose
from tw_recipes.tasks.multiply import ProductOfIntegers
from tw_recipes.tasks.products import SumOfProducts
from tw_recipes.tasks.splits import Split, Style

__all__ = ["TASKS", "ProductOfIntegers", "SomeDecompose", "SumOfProducts", "Task", "get_task"]


class Task(Protocol):
    """What pipelines ask of a task; tasks are frozen data classes."""

    name: str

    def rows(
        self,
        count: int,
        *,
        seed: int,
        split: Split = "train",
        style: Style = "forkjoin",
        offset: int = 0,
        plain: bool = False,
    ) -> list[dict[str, str]]:
        """Data set rows {"prompt", "text", "answer", "difficulty"}; `plain` for the tokenizer of a real model."""

    def tokenizer(self) -> Any:
        """A tokenizer for every text of the task that is not plain, the tags single tokens."""

    def grader(self) -> Any:
        """A `tw_recipes.evaluation.grading.Grader` that reads the response only."""


TASKS: dict[str, Task] = {task.name: task for task in (SumOfProducts(), ProductOfIntegers(), SomeDecompose())}


def get_task(name: str, **options: Any) -> Task:
    """The task of that name.

    Args:
        name: A key of `TASKS`.
        **options: Attributes of the task that differ from the defaults.

    Raises:
        KeyError: There is none; the message lists the names.
        TypeError: The task has no such option.
        ValueError: An option is out of range.
    """
    if name not in TASKS:
        raise KeyError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return replace(TASKS[name], **options) if options else TASKS[name]  # type: ignore[type-var]
