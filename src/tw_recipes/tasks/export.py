"""`threadweaver tasks`: problems with solutions as data set files, JSONL or Parquet.

    threadweaver tasks multiply --out data/multiply                            train.jsonl and validation.jsonl
    threadweaver tasks products --plain --format parquet --style sequential    for the tokenizer of a real model

Rows are {"prompt", "text", "answer", "difficulty"}, what `threadweaver sft`, `rollout` and `eval` read. Both files are
made by the seed alone and share no problem. Tests: tests/recipes/tasks/test_export.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tw_recipes.data import write_jsonl
from tw_recipes.tasks import TASKS, get_task
from tw_recipes.tasks.splits import Style


def export(
    name: Annotated[str, tyro.conf.Positional],
    out: Path | None = None,
    *,
    train: int = 10_000,
    validation: int = 1_000,
    style: Style = "forkjoin",
    format: Literal["jsonl", "parquet"] = "jsonl",
    plain: bool = False,
    nested: bool = False,
    seed: int = 0,
) -> dict[str, Path]:
    """Write a task's problems with solutions.

    Args:
        name: The task: products, multiply or adaptive.
        out: Folder of the files. Default: data/NAME.
        train: Rows of train; 0 leaves the file out.
        validation: Rows of validation, none of which is in train, whatever the seed; 0 leaves the file out.
        style: Of the solutions, sequential or forkjoin.
        format: Of the files.
        plain: Ordinary notation for the tokenizer of a real model; otherwise the labelled digits that the task's own
            tokenizer reads.
        nested: Fork/join solutions with blocks inside threads (multiply only).
        seed: Of the problems.

    Returns:
        "train" and "validation", those that were asked for, with their files.

    Raises:
        KeyError: No such task.
        ValueError: `nested` with another task, or impossible numbers of rows.
    """
    if nested and name in TASKS and not hasattr(TASKS[name], "nested"):
        raise ValueError(f"nested=True needs the task multiply, got {name!r}: its solutions have one block")
    if min(train, validation) < 0 or not train + validation:
        raise ValueError(
            f"train and validation must be at least 0, and one of them more, got {train} and {validation}; 0 leaves a "
            "file out"
        )
    task = get_task(name, **({"nested": True} if nested else {}))
    folder = out if out is not None else Path("data") / name
    files = {}
    for file, split, count in (("train", "train", train), ("validation", "test", validation)):
        if not count:
            continue
        rows = task.rows(count, seed=seed, split=split, style=style, plain=plain)  # type: ignore[arg-type]
        path = folder / f"{file}.{format}"
        if format == "parquet":
            import pyarrow
            from pyarrow import parquet

            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            write_jsonl(path, rows)
        files[file] = path
    return files


def main(argv: Sequence[str]) -> int:
    """Run `export` from flags; 0 when the files are written, 1 otherwise."""
    try:
        files = tyro.cli(export, args=list(argv), prog="threadweaver tasks", description=export.__doc__)
    except (KeyError, ValueError) as error:
        print(f"threadweaver tasks: {error.args[0]}", file=sys.stderr)
        return 1
    for path in files.values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
