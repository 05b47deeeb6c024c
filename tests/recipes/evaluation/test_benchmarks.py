"""Data sets by name, on local copies with the columns of the published ones; local files; what is wrong with them."""

import json

import pytest
from datasets import Dataset

from tw_core.errors import ThreadWeaverError
from tw_recipes.evaluation.benchmarks import BENCHMARKS, BenchmarkError, benchmark_name, load_problems

# The columns of each data set on the Hub.
ROWS = {
    "aime24": {"id": 60, "problem": "Q", "solution": "S", "answer": "204", "url": "u", "year": "2024"},
    "aime25": {"problem": "Q", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "Q", "answer": 27.0, "url": "u"},
    "math500": {"problem": "Q", "solution": "S", "answer": r"\frac{1}{2}", "level": 2, "unique_id": "test/a/1.json"},
    "minerva": {"question": "Q", "answer": "1e33"},
    "olympiad": {"id": 1606, "question": "Q", "solution": ["S"], "final_answer": ["$2$", "$3$"]},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_named_data_set_loads_through_datasets(name, tmp_path):
    spec = BENCHMARKS[name]
    key = {spec.key: "test/a/2.json"} if spec.key else {}
    rows = Dataset.from_list([ROWS[name], ROWS[name] | key])
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / f"{spec.split}-00000-of-00001.parquet")
    problems = load_problems(name, path=str(tmp_path))
    assert len(problems) == 2
    assert problems[0].question == "Q"
    expected = {"olympiad": "$2$, $3$", "amc23": "27.0"}.get(name, str(ROWS[name].get("answer")))
    assert problems[0].answer == expected
    assert problems[0].id == ("test/a/1.json" if name == "math500" else "0")
    assert len(load_problems(name, path=str(tmp_path), limit=1)) == 1


def test_spellings():
    names = ["AIME24", "aime_2025", "AMC23", "MATH-500", "MinervaMath", "OlympiadBench"]
    assert [benchmark_name(name) for name in names] == list(BENCHMARKS)
    assert benchmark_name("gsm8k") is None
    with pytest.raises(BenchmarkError, match=r"aime24, .* or a .jsonl or .parquet file, got 'gsm8k'"):
        load_problems("gsm8k")


def test_local_files(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "p", "q": "2+2?", "a": 4}\n{"id": "r", "q": "1?", "a": "1"}\n')
    problems = load_problems(str(path), question_column="q", answer_column="a")
    assert [tuple(p) for p in problems] == [("p", "2+2?", "4"), ("r", "1?", "1")]
    with pytest.raises(BenchmarkError, match=r"row 1: column 'answer' is missing or null, the row has id, q, a"):
        load_problems(str(path), question_column="q")
    for limit in (0, -1):  # -1 left out the last problem
        with pytest.raises(BenchmarkError, match=f"limit must be at least 1, got {limit}"):
            load_problems(str(path), question_column="q", answer_column="a", limit=limit)
    with pytest.raises(ThreadWeaverError, match="'question'"):
        load_problems(str(path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_problems(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("row", "message"), [({"answer": " "}, "'answer' is empty"), ({"id": "a"}, "column 'id' repeats 'a'")]
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    good = {"id": "a", "question": "Q", "answer": "1"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"id": "b"} | row) + "\n")
    with pytest.raises(BenchmarkError, match=f"row 2: column.*{message}|row 2: {message}"):
        load_problems(str(path))
