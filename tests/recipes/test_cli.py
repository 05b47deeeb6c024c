"""The `threadweaver` command: its words are pinned, each leads to a module with a `main`, and errors say what to do."""

import subprocess
import sys
from importlib import import_module

import pytest

from tw_recipes import cli

WORDS = ["eval", "generate-data", "grpo", "inspect", "quickstart", "reproduce", "rollout", "sft", "tasks", "view"]


def test_the_words_are_pinned_and_sorted():
    assert list(cli.COMMANDS) == WORDS


def test_help_lists_every_word(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  ")] == WORDS
    assert all(command.help in said for command in cli.COMMANDS.values())
    assert cli.main([]) == 2


@pytest.mark.parametrize("word", WORDS)
def test_every_word_has_a_main_and_a_help(word, capsys):
    assert callable(import_module(cli.COMMANDS[word].module).main)
    with pytest.raises(SystemExit) as left:
        cli.main([word, "--help"])
    assert left.value.code in (0, None)
    assert f"threadweaver {word}" in capsys.readouterr().out


def test_an_unknown_word_lists_the_known_ones(capsys):
    assert cli.main(["trian"]) == 2
    assert f"command must be one of {', '.join(WORDS)}, got 'trian'" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(cli, "import_module", missing)
    assert cli.main(["view"]) == 2
    assert capsys.readouterr().err == "threadweaver view needs 'tyro': pip install \"threadweaver[recipes]\"\n"


def test_a_module_of_ours_that_is_missing_is_a_bug_and_raises(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cli, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["view"])


def test_help_loads_no_trainer():
    code = (
        "import sys; from tw_recipes.cli import main; main(['--help']); assert not {'torch', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
