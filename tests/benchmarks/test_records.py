"""Results files: fixed fields, finite values, and earlier figures kept where they were not measured anew."""

import json
import math

import pytest
from benchmarks.records import write_records


def record(case, impl, value, metric="fwd_ms"):
    return {"case": case, "impl": impl, "metric": metric, "value": value, "unit": "ms"}


def test_a_file_says_where_its_figures_come_from(tmp_path):
    path = write_records(tmp_path / "deep" / "x.json", [record("a", "b", 1.0)], command="make x", seed=3, device="cpu")
    found = json.loads(path.read_text())
    assert found["records"] == [record("a", "b", 1.0)]
    assert (found["meta"]["command"], found["meta"]["seed"]) == ("make x", 3)
    assert set(found["meta"]) == {"command", "device", "torch", "triton", "transformers", "commit", "date", "seed"}


def test_merging_replaces_whole_pairs_of_case_and_impl(tmp_path):
    old = [record("a", "ours", 1.0), record("a", "ours", 9.0, "old_metric"), record("a", "theirs", 2.0)]
    first = write_records(tmp_path / "1.json", old, command="one", seed=0, device="cpu")
    new = [record("a", "ours", 0.5), record("b", "ours", 4.0)]
    second = write_records(
        tmp_path / "2.json", new, command="two", seed=0, device="cpu", merge=json.loads(first.read_text())
    )
    found = json.loads(second.read_text())
    assert found["records"] == [old[2], *new]
    assert found["meta"]["command"] == "two"
    assert [meta["command"] for meta in found["meta"]["earlier"]] == ["one"]
    third = write_records(tmp_path / "3.json", new[:1], command="three", seed=0, device="cpu", merge=found)
    found = json.loads(third.read_text())
    assert [meta["command"] for meta in found["meta"]["earlier"]] == ["one", "two"]
    assert "earlier" not in found["meta"]["earlier"][1]


def test_notes_join_the_meta_and_a_failed_write_leaves_the_file(tmp_path, monkeypatch):
    path = write_records(tmp_path / "x.json", [record("a", "b", 1.0)], command="", seed=0, device="cpu", notes={"n": 1})
    before = path.read_text()
    assert json.loads(before)["meta"]["n"] == 1

    def cut(self, text):
        self.write_bytes(text[:20].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        write_records(path, [record("a", "b", 2.0)], command="", seed=0, device="cpu")
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "records is empty; measure something before writing"),
        ([record("a", "b", math.nan)], r"records\[0\] has the value nan; leave out what was not measured"),
        ([{"case": "a", "value": 1.0}], r"records\[0\] must have the fields case, impl, metric, value, unit"),
    ],
)
def test_bad_records_are_named(records, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_records(tmp_path / "x.json", records, command="", seed=0, device="cpu")
