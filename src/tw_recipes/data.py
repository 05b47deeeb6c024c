"""Reads data set files, JSONL or Parquet, row by row, with errors that name the place.

    rows, skipped = read_rows("train.jsonl", ("prompt", "text", "answer"))
    RowReadError: train.jsonl, line 7, column 'text': expected a string, got null; repair the row, …

Nothing is dropped in silence: with `skip_bad` the bad rows are counted and listed in `skipped`.
Tests: tests/recipes/test_data.py.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tw_core.errors import ThreadWeaverError

Check = Callable[[Mapping[str, Any]], tuple[str, str] | None]
"""Looks at a row; (column, what is wrong) or None."""


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used.

    Attributes:
        file: Path of the file.
        line: 1-based line of a JSONL file, 1-based row of anything else.
        column: Name of the column, "" when the row as a whole is bad.
        reason: What was expected and what was found.
    """

    file: str
    line: int
    column: str
    reason: str

    def __str__(self) -> str:
        column = f", column {self.column!r}" if self.column else ""
        unit = "line" if self.file.endswith(".jsonl") else "row"
        return f"{self.file}, {unit} {self.line}{column}: {self.reason}"


class RowReadError(ThreadWeaverError, ValueError):
    """A row of a data set file is corrupted; `bad` says where."""

    def __init__(self, bad: BadRow):
        super().__init__(f"{bad}; repair the row, or name another column")
        self.bad = bad


class ReadResult(NamedTuple):
    """The rows of a file and what was left out."""

    rows: list[dict[str, Any]]
    skipped: list[BadRow]

    def report(self, limit: int = 5) -> str:
        """One line, and the first bad rows below it."""
        lines = [f"{len(self.rows)} rows read, {len(self.skipped)} skipped"]
        lines += [f"  {bad}" for bad in self.skipped[:limit]]
        if len(self.skipped) > limit:
            lines.append(f"  and {len(self.skipped) - limit} more")
        return "\n".join(lines)


def read_rows(
    path: str | Path, columns: Sequence[str], *, skip_bad: bool = False, check: Check | None = None
) -> ReadResult:
    """Read a data set file and check every row.

    Args:
        path: A .jsonl (one JSON object a line; empty lines are allowed) or .parquet file.
        columns: Columns that every row must have, as non-empty strings. Further columns pass unchecked.
        skip_bad: Leave bad rows out, counted and listed, instead of stopping at the first.
        check: A further check of each row, for example `fork_join_text`.

    Raises:
        FileNotFoundError: The file does not exist.
        RowReadError: A row is bad and `skip_bad` is off, or no row is good.
        ValueError: The file has another suffix.
    """
    skipped: list[BadRow] = []
    rows = list(iter_rows(path, columns, skipped=skipped if skip_bad else None, check=check))
    if not rows:
        bad = skipped[0] if skipped else BadRow(str(path), 1, "", "expected at least one row, the file is empty")
        raise RowReadError(bad)
    return ReadResult(rows, skipped)


def iter_rows(
    path: str | Path, columns: Sequence[str], *, skipped: list[BadRow] | None = None, check: Check | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a data set file one at a time, each checked: for files that need not fit into memory.

    Args:
        path: As for `read_rows`, like `columns` and `check`.
        columns: Columns that every row must have, as non-empty strings.
        skipped: Where bad rows are listed while the good ones go on; None stops at the first.
        check: A further check of each row.

    Raises:
        FileNotFoundError: The file does not exist.
        RowReadError: A row is bad and `skipped` is None.
        ValueError: The file has another suffix.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"path must end in {' or '.join(_READERS)}, got {path}; convert the file")
    if not path.is_file():
        raise FileNotFoundError(f"data set file {path} does not exist; check the path")
    for line, row in _READERS[path.suffix](path):
        problem = row if isinstance(row, _Unreadable) else _problem(row, columns, check)
        if problem is None:
            yield row
            continue
        bad = BadRow(str(path), line, *problem)
        if skipped is None:
            raise RowReadError(bad)
        skipped.append(bad)


def content_setting(source: str | Path, settings: Path) -> dict[str, str]:
    """What the settings of a resumable run say of an input file, so that it is not gone on with on another content.

    Args:
        source: The input.
        settings: The file that keeps the run's settings.

    Returns:
        {"sha256": …}; empty where `source` is no file (a data set of the Hub), or where `settings` was written by a
        version that did not compare contents.
    """
    if not Path(source).is_file():
        return {}
    if settings.exists() and "sha256" not in json.loads(settings.read_text(encoding="utf-8")):
        return {}
    with Path(source).open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def require_local(argument: str, name: str) -> None:
    """Refuse a name that can only be a path, and where nothing is, before the Hub is asked for it.

    Raises:
        FileNotFoundError: Such a name.
    """
    path = Path(name)
    local = name.startswith((".", "/", "~")) or name.count(os.sep) > 1 or (os.sep in name and path.parent.is_dir())
    if local and not path.exists():
        raise FileNotFoundError(
            f"{argument} must be a local folder or a name on the Hub, got {name!r}: there is no such folder; check the "
            "path"
        )


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines; the folder is made where it is missing. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def fork_join_text(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """A `Check`: the column "text" must be well-formed fork/join text (plain text is)."""
    from tw_core import check_format

    problems = check_format(row["text"]).problems
    return ("text", f"at character {problems[0].offset}: {problems[0].message}") if problems else None


class _Unreadable(NamedTuple):
    column: str
    reason: str


def _problem(row: Any, columns: Sequence[str], check: Check | None) -> tuple[str, str] | None:
    if not isinstance(row, dict):
        return "", f"expected a JSON object, got {_kind(row)}"
    for column in columns:
        if column not in row:
            return column, f"expected the columns {', '.join(columns)}, got {', '.join(row) or 'none'}"
        if not isinstance(row[column], str):
            return column, f"expected a string, got {_kind(row[column])}"
        if not row[column]:
            return column, "expected a non-empty string, got an empty one"
    return check(row) if check is not None else None


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), f"{value!r}"[:40])


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            yield line, _parsed(data)


def _parsed(data: bytes) -> Any:
    """The value of one line of JSON, or why there is none."""
    try:
        row = json.loads(data.rstrip().decode("utf-8"))
        if b"\\ud" in data.lower():  # half of a surrogate pair is no text: no file could be written with it
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except UnicodeDecodeError as error:
        return _Unreadable("", f"expected UTF-8, got the byte 0x{data[error.start]:02x} at {error.start}")
    except UnicodeEncodeError as error:
        return _Unreadable("", f"expected text, got half of a surrogate pair, {error.object[error.start]!a}")
    except json.JSONDecodeError as error:
        return _Unreadable("", f"expected one JSON object: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        return _Unreadable("", f"expected one JSON object: {error}")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise RowReadError(BadRow(str(path), 1, "", f"expected a Parquet file: {error}")) from error
    line = 0
    with file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                line += 1
                yield line, row


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {".jsonl": _jsonl, ".parquet": _parquet}
