"""Files that docstrings and comments name are there: "guarded by" a test that is gone guards nothing."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(?:(?:tests|benchmarks|docs|examples|src|tools)/[\w./-]*\.(?:py|md|yaml|sh)|\btest_\w+\.py)\b")
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def missing(text: str) -> list[str]:
    """Names of files that do not exist; a bare test_x.py stands in the folder of the test that was named before it."""
    folder, found = ROOT / "tests", []
    for name in NAMED.findall(text):
        path = ROOT / name if "/" in name else folder / name
        if "/" in name and name.startswith("tests/"):
            folder = path.parent
        if not path.exists():
            found.append(name)
    return found


def test_named_files_exist() -> None:
    found = {str(path.relative_to(ROOT)): missing(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_missing_file_is_found() -> None:
    assert missing("Guarded by tests/core/test_trie.py, test_units.py and test_none.py; docs/none.md.") == [
        "test_none.py",
        "docs/none.md",
    ]
