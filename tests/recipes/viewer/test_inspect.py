"""`threadweaver inspect`: a file in figures, one trajectory in detail."""

import json

import pytest

from tests.support.rollouts import FORKED, model_folder
from tw_recipes.cli import main

BROKEN = FORKED.replace("</Parallel>", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect")
    model_folder(path / "model")
    nested = FORKED.replace("three", f"three {FORKED} four")
    rows = [{"prompt": "a?", "text": FORKED}, {"prompt": "b?", "text": BROKEN}, {"prompt": "c?", "text": nested}]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(capsys, *words):
    status = main(["inspect", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_data_set(folder, capsys):
    status, out = said(capsys, folder / "train.jsonl", "--tokenizer", folder / "model")
    assert status == 0
    for piece in ("2 of 3 (66.7%)", "tokens T", "critical path L", "sharing ratio r", "mean 1.33, 2.00 threads each"):
        assert piece in out
    assert "character" in out
    assert "expected </Parallel>" in out
    assert "1: malformed fork/join text" in out, "the tries are of two rows, and the third is accounted for"
    assert "1 more problems" not in out
    status, out = said(capsys, folder / "train.jsonl", "--problems", "0")
    assert "and 1 more problems; --problems 1 lists all" in out
    assert "text needs --tokenizer" in out


def test_one_trajectory(folder, capsys):
    status, out = said(capsys, folder / "train.jsonl", "--key", "3", "--tokenizer", folder / "model")
    assert status == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    threads = [row for row in rows if len(row) == 4]
    assert [row[:2] for row in threads] == [["1", "1"], ["1", "2"], ["1.2.1", "1"], ["1.2.1", "2"]]
    assert threads[0][2:] == [str(len("\n1: two by two is four, and so on\n")), "left"], "one token a byte"
    assert ["format", "well-formed"] in rows
    drawn = [line for line in out.splitlines() if line.startswith("rows ")]
    assert len(drawn) == 5, "the head, thread 1 with the joined copies, two nested branches below thread 2"
    assert drawn[-1].split()[2].startswith("+"), "the last branch"
    assert max(map(len, out.splitlines())) <= 80


def test_a_text_file_with_problems(tmp_path, capsys):
    path = tmp_path / "one.txt"
    path.write_text(BROKEN)
    status, out = said(capsys, path)
    assert status == 0
    assert f"character {len(BROKEN)}: expected </Parallel>" in " ".join(out.split())
    assert "no trie: text needs --tokenizer" in out
    assert "characters" in out


def test_bad_input_is_named(folder, tmp_path, capsys):
    status, out = said(capsys, folder / "train.jsonl", "--key", "9")
    assert status == 1
    assert "key must name a trajectory of" in out
    assert said(capsys, tmp_path / "no.jsonl")[0] == 1
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n" + json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b"}) + "\n")
    status, out = said(capsys, path)
    assert status == 1
    assert "line 1: expected a column" in out
    status, out = said(capsys, path, "--skip-bad")
    assert status == 0
    assert "left out: " in out
