"""Every form of a trajectory file is read; what is no trajectory is named with its line."""

import json

import pytest

from tests.support.rollouts import FORKED
from tests.support.sft import byte_tokenizer
from tw_recipes.data import RowReadError
from tw_recipes.viewer.entries import joined_ids, read_entries, trajectory_files

TURNS = [
    {"role": "user", "content": "7?"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "8?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
]


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_is_read(tmp_path):
    tokenizer = byte_tokenizer()
    ask, say = tokenizer.encode("ask"), tokenizer.encode("say")
    path = written(
        tmp_path / "all.jsonl",
        {"prompt": "how?", "text": FORKED, "key": "a#0"},
        {"question": "why?", "text": "so"},
        {"messages": TURNS, "id": 7},
        {"units": [[ask, say]]},
        {"sequences": [[1, 2], [1, 3]]},
    )
    found = list(read_entries(path, tokenizer=tokenizer))
    assert [entry.name for entry in found] == ["a#0", "2", "7", "4", "5"]
    assert [entry.prompt for entry in found] == ["how?", "why?", "8?", "ask", ""]
    assert [entry.text for entry in found] == [FORKED, "so", "<think>\nhm\n</think>\n\nyes", "say", None]
    assert list(read_entries(path))[3][1:3] == ("", None), "ids have no text without a tokenizer"
    text = tmp_path / "one.txt"
    text.write_text(FORKED)
    assert [entry[:3] for entry in read_entries(text)] == [("one.txt", "", FORKED)]


def test_the_joined_ids_of_a_row():
    ids, prompt = joined_ids({"ids": [1, 2, 3], "prompt_length": 2, "units": [[[1], [2]]]})
    assert (ids.tolist(), prompt) == ([1, 2, 3], 2)
    ids, prompt = joined_ids({"units": [[[1, 2], [3]], [[1, 2, 3, 4], [5]]]})
    assert (ids.tolist(), prompt) == ([1, 2, 3, 4, 5], 2)
    assert joined_ids({"text": "x"}) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "7"}, r"line 2: expected a column 'text', 'messages', 'units' or 'sequences', got answer"),
        ({"text": 7}, r"line 2, column 'text': expected a string, got 7"),
        ({"units": [[1, 2, 3]]}, r"line 2, column 'units': expected pairs \[context ids, completion ids\]"),
        ({"units": [[["a"], [2]]]}, r"line 2, column 'units': expected pairs \[context ids, completion ids\]"),
        ({"messages": ["hi", TURNS[1]]}, r"line 2, column 'messages': expected a list of turns with an assistant turn"),
        ({"messages": TURNS[:1]}, r"line 2, column 'messages': expected a list of turns with an assistant turn"),
        ({"sequences": []}, r"line 2: expected a column"),
    ],
)
def test_a_bad_row_is_named_or_listed(tmp_path, row, message):
    path = written(tmp_path / "bad.jsonl", {"text": "fine"}, row, {"text": "too"})
    with pytest.raises(RowReadError, match=message):
        list(read_entries(path))
    skipped = []
    assert [entry.text for entry in read_entries(path, skipped=skipped)] == ["fine", "too"]
    assert [bad.line for bad in skipped] == [2]


def test_a_turn_without_a_role_or_text_is_no_question(tmp_path):
    turns = [{"content": "x"}, {"role": "user", "content": "asked"}, {"role": "user", "content": None}, TURNS[1]]
    (entry,) = read_entries(written(tmp_path / "a.jsonl", {"messages": turns}))
    assert entry.prompt == "asked"


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(RowReadError, match=r"empty.jsonl, line 1: expected a row, the file has none"):
        list(read_entries(written(tmp_path / "empty.jsonl")))


def test_a_folder_gives_its_files_of_trajectories(tmp_path):
    (tmp_path / "deep").mkdir()
    a = written(tmp_path / "a.jsonl", {"text": "x"})
    b = written(tmp_path / "deep" / "b.jsonl", {"units": [[[1], [2]]]})
    written(tmp_path / "log.jsonl", {"loss": 1.0})
    written(tmp_path / "none.jsonl")
    assert trajectory_files(tmp_path) == [a, b]
    assert trajectory_files(a) == [a]
    with pytest.raises(FileNotFoundError, match=r"missing does not exist; give a file of trajectories or a folder"):
        trajectory_files(tmp_path / "missing")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing holds no .jsonl or .parquet file of trajectories"):
        trajectory_files(tmp_path / "nothing")
