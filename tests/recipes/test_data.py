"""Reading data set files: good rows come back, bad ones are named by file, line, column and reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.support.text import FORK_ROWS, MALFORMED_ROW
from tw_recipes.data import RowReadError, fork_join_text, read_rows, require_local, write_jsonl

COLUMNS = ("prompt", "text")
GOOD = [{"prompt": f"question {i}", "text": f"answer {i}"} for i in range(3)]


def _file(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "new" / "rows.jsonl", GOOD)
    parquet.write_table(pa.Table.from_pylist(GOOD), tmp_path / "rows.parquet")
    assert read_rows(jsonl, COLUMNS).rows == GOOD
    assert read_rows(tmp_path / "rows.parquet", COLUMNS).rows == GOOD


BAD_LINES: list[tuple[str | bytes, str, str]] = [
    ('{"prompt": "a", "text": "b"', "", "expected one JSON object: .* at character 27"),
    ('["a", "b"]', "", "expected a JSON object, got a list"),
    (b'{"prompt": "\xff", "text": "b"}', "", "expected UTF-8, got the byte 0xff at 12"),
    ('{"prompt": "a"}', "text", "expected the columns prompt, text, got prompt"),
    ('{"prompt": null, "text": "b"}', "prompt", "expected a string, got null"),
    ('{"prompt": "a", "text": 7}', "text", "expected a string, got 7"),
    ('{"prompt": "a", "text": ""}', "text", "expected a non-empty string"),
    (json.dumps(MALFORMED_ROW), "text", r"at character \d+: "),
    (r'{"prompt": "\ud83d", "text": "b"}', "", r"expected text, got half of a surrogate pair, '\\ud83d'"),
]
# Python's own limits: both ended the run, skip_bad or not.
ENORMOUS = {"brackets": b"[" * 100_000, "digits": b'{"prompt": "a", "text": "b", "n": ' + b"9" * 5_000 + b"}"}


@pytest.mark.parametrize(("line", "column", "reason"), BAD_LINES)
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path: Path, line: str | bytes, column: str, reason: str) -> None:
    # An empty line before it: lines are counted as an editor counts them.
    path = _file(tmp_path, json.dumps(FORK_ROWS[0]), "", line, json.dumps(FORK_ROWS[1]), "")
    place = f"rows.jsonl, line 3{f', column {column!r}' if column else ''}: {reason}"
    with pytest.raises(RowReadError, match=f"{place}.*; repair the row, or name another column$") as caught:
        read_rows(path, COLUMNS, check=fork_join_text)
    assert (caught.value.bad.line, caught.value.bad.column) == (3, column)
    result = read_rows(path, COLUMNS, check=fork_join_text, skip_bad=True)
    assert result.rows == FORK_ROWS[:2]
    assert [(bad.line, bad.column) for bad in result.skipped] == [(3, column)]
    assert "2 rows read, 1 skipped" in result.report()
    assert "line 3" in result.report()


@pytest.mark.parametrize("line", ENORMOUS.values(), ids=ENORMOUS.keys())
def test_an_enormous_line_is_a_bad_row(tmp_path: Path, line: bytes) -> None:
    result = read_rows(_file(tmp_path, line, json.dumps(FORK_ROWS[0])), COLUMNS, skip_bad=True)
    assert result.rows == FORK_ROWS[:1]
    assert [(bad.line, bad.reason[:26]) for bad in result.skipped] == [(1, "expected one JSON object: ")]


def test_escaped_pairs_are_text(tmp_path: Path) -> None:
    assert read_rows(_file(tmp_path, r'{"x": "\ud83d\ude00 \\ud83d"}'), ["x"]).rows == [{"x": "\U0001f600 \\ud83d"}]


def test_a_bad_parquet_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows: list[dict[str, Any]] = [GOOD[0], {"prompt": "a", "text": None}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(RowReadError, match=r"rows\.parquet, row 2, column 'text': expected a string, got null"):
        read_rows(path, COLUMNS)
    assert read_rows(path, COLUMNS, skip_bad=True).rows == [GOOD[0]]


def test_a_file_that_cannot_be_used_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist"):
        read_rows(tmp_path / "missing.jsonl", COLUMNS)
    with pytest.raises(ValueError, match=r"must end in .jsonl or .parquet, got .*rows.csv"):
        read_rows(tmp_path / "rows.csv", COLUMNS)
    with pytest.raises(RowReadError, match="at least one row"):
        read_rows(_file(tmp_path, ""), COLUMNS, skip_bad=True)
    with pytest.raises(RowReadError, match="line 1"):  # every row bad: nothing to go on with
        read_rows(_file(tmp_path, "no", "no"), COLUMNS, skip_bad=True)
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(RowReadError, match="expected a Parquet file"):
        read_rows(broken, COLUMNS)


def test_a_long_list_of_skipped_rows_is_cut_and_counted(tmp_path: Path) -> None:
    path = _file(tmp_path, *["no"] * 8, json.dumps(GOOD[0]))
    assert read_rows(path, COLUMNS, skip_bad=True).report(limit=2).endswith("and 6 more")


def test_a_name_that_can_only_be_a_path_is_not_one_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "sft").mkdir(parents=True)
    for name in ("gpt2", "Qwen/Qwen3-8B", "out/sft", "./out", str(tmp_path)):
        require_local("model", name)
    for name in ("out/sfft", "out/sft/checkpoint-7", "./sft", "~/sft", "/models/x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"model must be a local folder .*, got '{name}'.* check the"):
            require_local("model", name)
