"""Figures of a file: sums where sums are meant, unknown figures left out."""

from tests.support.rollouts import FORKED
from tw_recipes.viewer.entries import Entry
from tw_recipes.viewer.measures import measure
from tw_recipes.viewer.summary import summarize


def test_the_sharing_ratio_is_of_the_sums():
    rows = [{"sequences": [[1, 2, 3], [1, 2, 4]]}, {"sequences": [[1] * 100]}]
    lines = dict(summarize(measure(Entry("", "", None, row)) for row in rows).lines())
    assert lines["sharing ratio r"] == "1.02 (106 expanded tokens in 104 rows)"
    assert lines["trained tokens"] == "103"
    assert lines["trie rows"] == "mean 52.0, median 52, 95 % 95, max 100"
    assert "well-formed" not in lines


def test_text_statuses_and_reasons_are_counted():
    stats = {"total_tokens": 100, "critical_path_tokens": 60, "num_blocks": 1, "num_threads": 2}
    rows = [
        {"text": FORKED, "stats": stats, "status": "done", "reason": ""},
        {"text": "</Thread>", "stats": stats | {"num_blocks": 0, "num_threads": 0}, "status": "length", "reason": "x"},
    ]
    lines = dict(summarize(measure(Entry("", "", row["text"], row)) for row in rows).lines())
    assert lines["trajectories"] == "2"
    assert lines["status"] == "done 1, length 1"
    assert lines["well-formed"] == "1 of 2 (50.0%)"
    assert lines["acceleration 1 - L/T"] == "mean 0.400"
    assert lines["with a block"] == "50.0%"
    assert lines["blocks"] == "mean 0.50, 2.00 threads each"
    assert lines["without a trie"] == "2: text needs --tokenizer"


def test_nothing_is_one_line():
    assert summarize([]).lines() == [("trajectories", "0")]
