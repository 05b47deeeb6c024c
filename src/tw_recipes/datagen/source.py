"""Reads traces: JSONL, Parquet, or a data set of the Hub, row by row and never all at once.

A row has a question, the reasoning, the answer text and the ground truth; where the reasoning column holds a whole
response, `<think>…</think>` is cut. A row that cannot be read is a rejected sample with its reason, not a hole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tw_recipes.data import BadRow, iter_rows, require_local
from tw_recipes.datagen.models import Dropped, Sample, Trace
from tw_recipes.datagen.reasons import Reason

_THINK, _END = "<think>", "</think>"


@dataclass(frozen=True)
class Columns:
    """Columns of the input.

    Attributes:
        question: The problem.
        reasoning: The trace; a whole response with `<think>` where `answer` is None.
        answer: The text after the reasoning, with the boxed answer; None: it follows `</think>` in `reasoning`.
        truth: The reference answer.
        id: A name; None: the place in the input.
    """

    question: str = "question"
    reasoning: str = "reasoning"
    answer: str | None = "answer"
    truth: str = "ground_truth"
    id: str | None = None

    @property
    def needed(self) -> list[str]:
        """Columns that every row must have, as non-empty strings."""
        return [name for name in (self.question, self.reasoning, self.answer, self.truth) if name is not None]


def read_traces(source: str, columns: Columns, *, split: str = "train") -> Iterator[Trace | Sample]:
    """Read traces in order; a bad row comes as a rejected `Sample`.

    Args:
        source: A .jsonl or .parquet file, or the name of a Hub data set, which is streamed.
        columns: Where the texts are.
        split: Of a Hub data set.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
    """
    for place, row in enumerate(_rows(source, columns.needed, split)):
        if isinstance(row, BadRow):
            yield _rejected(place, str(place), str(row))
            continue
        name = str(place if columns.id is None else row.get(columns.id, place))
        reasoning, answer = row[columns.reasoning], row[columns.answer] if columns.answer is not None else None
        if answer is None:
            if _END not in reasoning:
                yield _rejected(place, name, f"{columns.reasoning!r} holds no {_END}; name the column of the answer")
                continue
            reasoning, _, answer = reasoning.rpartition(_END)
            reasoning = reasoning.removeprefix(_THINK).removeprefix("\n")
        yield Trace(
            place=place,
            id=name,
            question=row[columns.question],
            reasoning=reasoning,
            answer=answer.removeprefix("\n").removeprefix("\n"),
            truth=row[columns.truth],
        )


def _rows(source: str, needed: list[str], split: str) -> Iterator[dict[str, Any] | BadRow]:
    if Path(source).suffix not in (".jsonl", ".parquet"):
        yield from _hub_rows(source, needed, split)
        return
    bad: list[BadRow] = []
    for row in iter_rows(source, needed, skipped=bad):
        yield from bad  # they stand before this row
        bad.clear()
        yield row
    yield from bad


def _hub_rows(source: str, needed: list[str], split: str) -> Iterator[dict[str, Any] | BadRow]:
    from datasets import load_dataset

    require_local("source", source)
    for line, row in enumerate(load_dataset(source, split=split, streaming=True), 1):
        missing = [name for name in needed if not isinstance(row.get(name), str) or not row[name]]
        has = f"expected a non-empty string; the row has {', '.join(row)}"
        yield BadRow(source, line, missing[0], has) if missing else dict(row)


def _rejected(place: int, name: str, detail: str) -> Sample:
    dropped = Dropped(reason=Reason.INPUT_ROW, detail=detail[:300])
    return Sample(place=place, id=name, kind="rejected", dropped=[dropped])
