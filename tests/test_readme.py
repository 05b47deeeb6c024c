"""The README's example runs as written, and what README and docs name is there."""

import re
from pathlib import Path

import pytest

from tw_recipes.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_example_runs_as_written(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == "24 tokens in 11 rows, sharing ratio 2.18\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path):
    """Links, commands, make targets, example files and test files."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"(?<![\w/])(?:examples|tests|benchmarks|docs)/[\w/.-]+\.(?:yaml|py|md|json)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [file for file in files if not (ROOT / file).exists()]
    words = re.findall(r"(?:^ *|`)threadweaver ([a-z-]+)", text, re.MULTILINE)
    missing += [f"threadweaver {word}" for word in words if word not in COMMANDS]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^ *|`)make ([a-z-]+)", text, re.MULTILINE)
    missing += [f"make {target}" for target in named if target not in targets]
    assert not missing


def test_every_command_stands_in_the_readme():
    named = set(re.findall(r"threadweaver ([a-z-]+)", README.read_text()))
    assert set(COMMANDS) - {"quickstart", "tasks"} <= named
