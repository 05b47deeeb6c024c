"""`threadweaver view`: one page for a file or a folder, nothing left out in silence."""

import json

import pytest

from tests.recipes.viewer.test_html import read
from tests.support.rollouts import FORKED, model_folder, text_engine
from tw_core import TagIds
from tw_recipes.cli import main
from tw_recipes.decoding import ForkJoinDecoder
from tw_recipes.rollout import Prompt, rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rollouts and a data set."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("view")
    tokenizer = AutoTokenizer.from_pretrained(model_folder(path / "model"))
    decoder = ForkJoinDecoder(text_engine(tokenizer), TagIds.from_tokenizer(tokenizer))
    prompts = [Prompt(str(i), tokenizer.encode("how <b>many</b>?"), {"prompt": "how <b>many</b>?"}) for i in range(3)]
    rollout(prompts, decoder, tokenizer, path / "data" / "rollouts.jsonl")
    rows = [{"prompt": f"{i}?", "text": FORKED} for i in range(3)]
    (path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_rollouts(folder, capsys):
    assert main(["view", str(folder / "data" / "rollouts.jsonl")]) == 0
    out = folder / "data" / "rollouts.html"
    assert capsys.readouterr().out == f"{out}\n"
    html = out.read_text()
    found = read(html)
    assert found.lanes == 6
    for piece in ("status done", "0#0: how <b>many</b>?", "two by two is four", "rows 0..", "1.2", "3 of 3 (100.0%)"):
        assert piece in found.text
    for loaded in ("<script", "http://", "https://", "src="):
        assert loaded not in html


def test_a_folder_of_files(folder):
    assert main(["view", str(folder / "data"), "--tokenizer", str(folder / "model"), "--limit", "2"]) == 0
    found = read((folder / "data" / "view.html").read_text())
    assert found.lanes == 8
    assert found.text.count("The first 2 trajectories of the file.") == 2
    assert found.text.index("rollouts.jsonl") < found.text.index("train.jsonl")


def test_bad_rows_and_ids_alone_are_named(tmp_path, capsys):
    path, out = tmp_path / "x.jsonl", tmp_path / "deep" / "x.html"
    path.write_text(json.dumps({"text": "a"}) + "\n{\n")
    assert main(["view", str(path), "--out", str(out)]) == 1
    assert "x.jsonl, line 2: expected one JSON object" in capsys.readouterr().err
    assert not out.exists()
    assert main(["view", str(path), "--out", str(out), "--skip-bad"]) == 0
    assert "left out: " in read(out.read_text()).text
    path.write_text(json.dumps({"units": [[[1], [2]]]}) + "\n")
    assert main(["view", str(path)]) == 1
    assert "trajectory '1' holds ids alone; pass --tokenizer to see their text" in capsys.readouterr().err
    assert main(["view", str(path), "--limit", "0"]) == 1
    assert "limit must be at least 1, got 0" in capsys.readouterr().err
