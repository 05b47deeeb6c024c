"""tools/tables.py: tables say what the results files say, and a stale or empty one is an error."""

import json

import pytest
from tools import tables

SPEC = "speed-cpu rows=case cols=impl metric=ms digits=1"
WANT = "| case | ours | theirs |\n|---|---|---|\n| small | 1.2 | 2.0 |\n| large | 1,234.6 |  |\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    rows = [("small", "ours", 1.24), ("small", "theirs", 2.0), ("large", "ours", 1234.56)]
    records = [{"case": c, "impl": i, "metric": "ms", "value": v, "unit": "ms"} for c, i, v in rows]
    (results / "speed-cpu.json").write_text(json.dumps({"records": records}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


def test_a_table_is_made_of_records(root):
    assert tables.render_table(SPEC, root / "benchmarks" / "results") == WANT
    short = tables.render_table(f"{SPEC} case=large,small impl=ours", root / "benchmarks" / "results")
    assert short == "| case | ours |\n|---|---|\n| large | 1,234.6 |\n| small | 1.2 |\n"


def test_a_stale_table_fails_and_is_rewritten(root, monkeypatch, capsys):
    page = root / "docs" / "x.md"
    (root / "README.md").write_text("no table\n")
    page.write_text(f"before\n\n<!-- table {SPEC} -->\nold\n<!-- /table -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["tables.py"])
    assert tables.main() == 1
    assert "stale table in docs/x.md" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tables.py", "--fix"])
    assert tables.main() == 0
    assert page.read_text() == f"before\n\n<!-- table {SPEC} -->\n{WANT}<!-- /table -->\nafter\n"
    monkeypatch.setattr("sys.argv", ["tables.py"])
    assert tables.main() == 0


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("missing-cpu", FileNotFoundError, "missing-cpu.json"),
        ("speed-cpu metric=none", ValueError, "no record of speed-cpu.json matches"),
        ("speed-cpu colour=red", ValueError, r"unknown words \['colour'\]"),
    ],
)
def test_a_table_that_cannot_be_made_is_an_error(root, spec, error, message):
    with pytest.raises(error, match=message):
        tables.render_table(spec, root / "benchmarks" / "results")
