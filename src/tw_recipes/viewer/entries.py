"""Trajectories to look at, read one by one from the files that the other commands write or train on.

    rollouts   lines of `threadweaver rollout`, `eval`, `grpo`: "text", "stats", "status", "calls", "units"
    text       {"prompt", "text"}          messages   {"messages"}: the last assistant turn
    units      {"units"}                   sequences  {"sequences"}: a trie without text
    a .txt file is one trajectory

Guarded by tests/recipes/viewer/test_entries.py.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tw_recipes.data import BadRow, RowReadError, iter_rows

FORMS = "'text', 'messages', 'units' or 'sequences'"


class Entry(NamedTuple):
    """One trajectory of a file.

    Attributes:
        name: The row's "key" or "id", else its number in the file, from 1.
        prompt: What was asked; "" where the file does not say.
        text: The response as fork/join text; None where there are only ids and no tokenizer.
        row: All columns.
    """

    name: str
    prompt: str
    text: str | None
    row: Mapping[str, Any]


def trajectory_files(path: str | Path) -> list[Path]:
    """The file itself, or of a folder the .jsonl and .parquet files, at any depth, whose first row is a trajectory.

    Raises:
        FileNotFoundError: There is nothing at `path`, or no such file below it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a file of trajectories or a folder of such files")
    found = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".parquet") and _holds_some(file))
    if not found:
        raise FileNotFoundError(f"{path} holds no .jsonl or .parquet file of trajectories; give the file itself")
    return found


def _holds_some(file: Path) -> bool:
    try:
        return next(iter_rows(file, (), check=_problem), None) is not None
    except RowReadError:
        return False


def read_entries(path: str | Path, *, tokenizer: Any = None, skipped: list[BadRow] | None = None) -> Iterator[Entry]:
    """The trajectories of one file, in order.

    Args:
        path: A .jsonl or .parquet file of a form above, or a .txt file that is one trajectory.
        tokenizer: Gives rows of units their text.
        skipped: Where bad rows are listed while the good ones go on; None stops at the first.

    Raises:
        FileNotFoundError: The file does not exist.
        RowReadError: A row is bad and `skipped` is None, or the file has no row.
        ValueError: The file has another suffix.
    """
    path = Path(path)
    if path.suffix == ".txt":
        yield Entry(path.name, "", path.read_text(encoding="utf-8"), {})
        return
    number = 0
    for number, row in enumerate(iter_rows(path, (), skipped=skipped, check=_problem), 1):
        name = next((str(row[column]) for column in ("key", "id") if row.get(column) is not None), str(number))
        yield Entry(name, _prompt(row, tokenizer), _text(row, tokenizer), row)
    if not number:
        raise RowReadError(skipped[0] if skipped else BadRow(str(path), 1, "", "expected a row, the file has none"))


def joined_ids(row: Mapping[str, Any]) -> tuple[np.ndarray, int] | None:
    """The joined ids of a row and the length of its prompt; None where the row holds no ids of one trajectory."""
    if row.get("ids") is not None and row.get("prompt_length") is not None:
        return np.asarray(row["ids"], dtype=np.int64), int(row["prompt_length"])
    if row.get("units"):
        context, completion = row["units"][-1]  # the last call of a finished trajectory has seen all the others
        return np.asarray([*context, *completion], dtype=np.int64), len(row["units"][0][0])
    return None


def _problem(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """A `Check`: the row is of a form that is read here."""
    if row.get("text") is not None:
        return None if isinstance(row["text"], str) else ("text", f"expected a string, got {row['text']!r:.40}")
    messages = row.get("messages")
    if messages is not None:
        turns = messages if isinstance(messages, list) else []
        spoken = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
        whole = all(isinstance(turn, dict) for turn in turns)
        if whole and spoken and all(isinstance(turn.get("content"), str) for turn in spoken):
            return None
        return "messages", "expected a list of turns with an assistant turn whose content is a string"
    units = row.get("units")
    if units is not None:
        pairs = isinstance(units, list) and units and all(isinstance(u, list) and len(u) == 2 for u in units)
        if pairs and all(_are_ids(ids) for pair in units for ids in pair):
            return None
        return "units", f"expected pairs [context ids, completion ids], got {units!r:.40}"
    if isinstance(row.get("sequences"), list) and row["sequences"]:
        return None
    return "", f"expected a column {FORMS}, got {', '.join(row) or 'none'}"


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _prompt(row: Mapping[str, Any], tokenizer: Any) -> str:
    for column in ("prompt", "question"):
        if isinstance(row.get(column), str):
            return row[column]
    if row.get("messages") is not None:
        asked = (turn.get("content") for turn in reversed(row["messages"]) if turn.get("role") == "user")
        return next((content for content in asked if isinstance(content, str)), "")
    found = joined_ids(row)
    return "" if found is None or tokenizer is None else tokenizer.decode(found[0][: found[1]])


def _text(row: Mapping[str, Any], tokenizer: Any) -> str | None:
    if row.get("text") is not None:
        return row["text"]
    if row.get("messages") is not None:
        turn = next(turn for turn in reversed(row["messages"]) if turn.get("role") == "assistant")
        thought = turn.get("reasoning_content")
        return f"<think>\n{thought}\n</think>\n\n{turn['content']}" if thought else turn["content"]
    found = joined_ids(row)
    return None if found is None or tokenizer is None else tokenizer.decode(found[0][found[1] :])
