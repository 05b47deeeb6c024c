"""`threadweaver tasks`: files in both formats read back, splits are disjoint, a real tokenizer's text is plain."""

import time
from pathlib import Path

import pytest

from tw_recipes import cli
from tw_recipes.data import fork_join_text, read_rows
from tw_recipes.tasks import TASKS
from tw_recipes.tasks.export import export

COLUMNS = ("prompt", "text", "answer", "difficulty")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("plain", [False, True])
def test_files_read_back(name: str, format: str, plain: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["tasks", name, "--out", str(tmp_path), "--format", format, "--train", "40", "--validation", "10"]
    assert cli.main([*words, *(["--plain"] if plain else [])]) == 0
    files = [tmp_path / f"train.{format}", tmp_path / f"validation.{format}"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    train, validation = (read_rows(file, COLUMNS, check=fork_join_text).rows for file in files)
    assert (len(train), len(validation)) == (40, 10)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    assert train == TASKS[name].rows(40, seed=0, plain=plain)


@pytest.mark.parametrize("name", TASKS)
def test_ten_thousand_problems_take_seconds(name: str, tmp_path: Path) -> None:
    began = time.process_time()
    files = export(name, tmp_path, plain=True)
    assert time.process_time() - began < 20  # 1 to 3 s on one core; a loop per token takes minutes
    assert len(files["train"].read_text().splitlines()) == 10_000
    assert len(files["validation"].read_text().splitlines()) == 1_000


def test_nested_solutions_on_request(tmp_path: Path) -> None:
    text = export("multiply", tmp_path, train=1, validation=1, nested=True)["train"].read_text()
    assert text.count("<Parallel>") > 3


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tasks", "sums", "--out", str(tmp_path)]) == 1
    assert "task must be one of products, multiply, adaptive, got 'sums'" in capsys.readouterr().err
    assert cli.main(["tasks", "products", "--nested"]) == 1
    assert "nested=True needs the task multiply, got 'products'" in capsys.readouterr().err
    for train, validation in ((0, 0), (5, -1)):
        sizes = ["--train", str(train), "--validation", str(validation)]
        assert cli.main(["tasks", "products", *sizes, "--out", str(tmp_path / "none")]) == 1
        problem = f"train and validation must be at least 0, and one of them more, got {train} and {validation}"
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_no_rows_of_one_file_leave_it_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tasks", "products", "--train", "0", "--validation", "3", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "validation.jsonl")]
    assert [path.name for path in tmp_path.iterdir()] == ["validation.jsonl"]
