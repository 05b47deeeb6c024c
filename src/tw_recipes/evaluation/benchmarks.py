"""Problems with answers: the six published data sets by name, through `datasets`, or a local file.

    problems = load_problems("math500")                                    # from the Hub
    problems = load_problems("math500", path="/data/MATH-500")             # the same columns from a local copy
    problems = load_problems("mine.jsonl", question_column="q", answer_column="a")

Guarded by tests/recipes/evaluation/test_benchmarks.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tw_core.errors import ThreadWeaverError
from tw_recipes.data import read_rows, require_local


class BenchmarkError(ThreadWeaverError, ValueError):
    """A data set is unknown, or has other columns than the ones that are read."""


class Problem(NamedTuple):
    """One problem: a name that is unique in its data set, the question, the reference answer."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """Where a data set lives and how it is read.

    Attributes:
        title: Column heading of the published table.
        path: Name on the Hub.
        split: Split that is evaluated.
        config: Configuration on the Hub, None for the only one.
        question: Column of the question.
        answer: Column of the answer; a list is joined with ", ".
        key: Column that names a problem, None: its place.
    """

    title: str
    path: str
    split: str
    question: str
    answer: str
    config: str | None = None
    key: str | None = None


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("AIME24", "HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": Benchmark("AIME25", "math-ai/aime25", "test", "problem", "answer"),
    "amc23": Benchmark("AMC23", "math-ai/amc23", "test", "question", "answer"),
    "math500": Benchmark("MATH500", "HuggingFaceH4/MATH-500", "test", "problem", "answer", key="unique_id"),
    "minerva": Benchmark("Minerva", "math-ai/minervamath", "test", "question", "answer"),
    "olympiad": Benchmark("Olympiad", "math-ai/olympiadbench", "test", "question", "final_answer"),
}
_ALIASES = {"olympiadbench": "olympiad", "minervamath": "minerva", "aime2024": "aime24", "aime2025": "aime25"}


def benchmark_name(name: str) -> str | None:
    """The key of `BENCHMARKS` that a user's spelling means ("MATH-500", "OlympiadBench"), None if it is none."""
    plain = name.lower().replace("-", "").replace("_", "")
    plain = _ALIASES.get(plain, plain)
    return plain if plain in BENCHMARKS else None


def load_problems(
    name: str,
    *,
    path: str | None = None,
    split: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """Loads a data set.

    Args:
        name: One of `BENCHMARKS` in any spelling, or a .jsonl or .parquet file.
        path: Another place for a named data set: a Hub name, or a local folder or file with the same columns.
        split: Overrides the data set's split.
        question_column: Overrides the column of the question (of a file: "question").
        answer_column: Overrides the column of the answer (of a file: "answer").
        limit: Only the first so many problems.
    Raises:
        BenchmarkError: `name` is neither, a column is missing, an answer is empty, or `limit` is below 1.
        RowReadError: A row of a local file is bad.
        FileNotFoundError: The local file does not exist.
    """
    if limit is not None and limit < 1:
        raise BenchmarkError(f"limit must be at least 1, got {limit}; leave it out for all problems")
    known = benchmark_name(name)
    if known is None:
        if Path(name).suffix not in (".jsonl", ".parquet"):
            raise BenchmarkError(
                f"data set must be one of {', '.join(BENCHMARKS)} or a .jsonl or .parquet file, got {name!r}"
            )
        question, answer, key = question_column or "question", answer_column or "answer", "id"
        return _problems(name, read_rows(name, (question,)).rows[:limit], question, answer, key)
    from datasets import load_dataset

    spec = BENCHMARKS[known]
    source, where = path or spec.path, split or spec.split
    if source.endswith((".jsonl", ".parquet")):
        if not Path(source).is_file():
            raise FileNotFoundError(f"path={source!r} does not exist; give a local copy of {spec.path}")
        kind = "json" if source.endswith(".jsonl") else "parquet"
        rows = load_dataset(kind, data_files=source, split="train")
    else:
        require_local("path", source)
        rows = load_dataset(source, spec.config, split=where)
    rows = rows.select(range(min(limit, len(rows)))) if limit is not None else rows
    return _problems(source, rows, question_column or spec.question, answer_column or spec.answer, spec.key)


def _problems(
    source: str, rows: Iterable[Mapping[str, Any]], question: str, answer: str, key: str | None
) -> list[Problem]:
    problems, seen = [], set()
    for number, row in enumerate(rows, 1):
        for column in (question, answer):
            if row.get(column) is None:
                raise BenchmarkError(
                    f"{source}, row {number}: column {column!r} is missing or null, the row has {', '.join(row)}; "
                    "name the columns with question_column and answer_column"
                )
        value = row[answer]
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if not text.strip():
            raise BenchmarkError(f"{source}, row {number}: column {answer!r} is empty; drop the row")
        name = str(number - 1) if key is None or row.get(key) is None else str(row[key])
        if name in seen:
            raise BenchmarkError(f"{source}, row {number}: column {key!r} repeats {name!r}; make it unique")
        seen.add(name)
        problems.append(Problem(name, str(row[question]), text))
    if not problems:
        raise BenchmarkError(f"{source} holds no problems; check the split")
    return problems
