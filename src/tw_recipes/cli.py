"""The `threadweaver` command: one table from a word to the module that does the job.

Each module has a plain Python function for the job and `main(argv) -> int`, which reads the flags and calls it. Modules
are imported when their word is called, so that `threadweaver --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives and what it does, in one line."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "eval": Command(
        "tw_recipes.evaluation.command", "accuracy, token latency and speedup on a data set, with a report"
    ),
    "generate-data": Command(
        "tw_recipes.datagen.command", "fork/join training data from sequential traces, and rounds of self-training"
    ),
    "grpo": Command("tw_recipes.grpo.command", "reinforcement learning on fork/join rollouts: P-GRPO and its baseline"),
    "inspect": Command("tw_recipes.viewer.inspect", "what a file of trajectories holds: format, lengths, tries"),
    "quickstart": Command("tw_recipes.pipelines.quickstart", "make data, train both models, decode, compare (CPU)"),
    "reproduce": Command(
        "tw_recipes.pipelines.reproduce.command", "the paper's experiment from data to report, CPU or one GPU"
    ),
    "rollout": Command("tw_recipes.rollout_command", "decode a file of prompts into a file of trajectories, resumable"),
    "sft": Command("tw_recipes.sft.command", "fine-tune a model on fork/join trajectories, packed as tries"),
    "tasks": Command("tw_recipes.tasks.export", "problems with solutions of a synthetic task as data set files"),
    "view": Command("tw_recipes.viewer.view", "trajectories as a self-contained HTML page, threads side by side"),
}


def usage() -> str:
    """The text of `threadweaver --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: threadweaver COMMAND [options]",
            "",
            *lines,
            "",
            "`threadweaver COMMAND --help` lists a command's options.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit status.

    Args:
        argv: Words after the program's name. Defaults to `sys.argv[1:]`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print(f"threadweaver: command must be one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    try:
        module = import_module(COMMANDS[name].module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tw_"):
            raise
        print(f'threadweaver {name} needs {error.name!r}: pip install "threadweaver[recipes]"', file=sys.stderr)
        return 2
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
