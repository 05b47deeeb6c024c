"""What a run of `quickstart` leaves: results.json, report.md with a plot, and the table on the terminal."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tw_recipes.pipelines.comparison import CALLS_IN_FLIGHT
from tw_recipes.pipelines.training import BATCH, Trained

Example = tuple[str, str, str]
"""(prompt, sequential response, fork/join response)"""


def versions() -> dict[str, str]:
    """Versions that decide the figures; "source" for a package that runs from its sources, not installed."""
    found = {"python": platform.python_version()}
    for name in ("threadweaver", "torch", "transformers", "trl", "tokenizers", "datasets", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


def training_figures(stages: Sequence[Trained]) -> dict[str, Any]:
    """Sums over a model's stages of training; the curve counts steps through."""
    curve, done = [], 0
    for stage in stages:
        curve += [[done + step, loss, accuracy] for step, loss, accuracy in stage.curve]
        done += stage.steps
    return {
        "steps": done,
        "problems": done * BATCH,
        "tokens_computed": sum(stage.tokens for stage in stages),
        "tokens_trained": sum(stage.targets for stage in stages),
        "curve": curve,
    }


def table_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, sequential, fork/join) as text."""
    one, two = results["sequential"], results["forkjoin"]
    both = one, two

    def pair(name: str, form: str) -> tuple[str, str]:
        return form.format(one[name]), form.format(two[name])

    counts = [f"{side['accuracy']:.1%} ({side['correct']}/{side['problems']})" for side in both]
    training = [side["training"] for side in both]
    return [
        ("accuracy on held-out problems", *counts),
        ("tokens a response", *pair("tokens", "{:.1f}")),
        ("tokens on the critical path", *pair("token_latency", "{:.1f}")),
        ("speedup in tokens (mean)", "1.00x", f"{two['speedup_tokens']:.2f}x"),
        ("wall clock, one problem at a time", *pair("wall_seconds_single", "{:.2f} s")),
        ("speedup in wall clock, one at a time", "1.00x", f"{two['speedup_wall']:.2f}x"),
        (f"wall clock, all problems, {CALLS_IN_FLIGHT} calls at a time", *pair("wall_seconds_all", "{:.1f} s")),
        ("well-formed fork/join responses", "", f"{two['format_correct']:.1%}"),
        ("trained: steps (problems seen)", *(f"{t['steps']} ({t['problems']:,})" for t in training)),
        ("trained: tokens computed", *(f"{t['tokens_computed']:,}" for t in training)),
        ("trained: tokens with loss", *(f"{t['tokens_trained']:,}" for t in training)),
    ]


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table("", "sequential", "fork/join", title="quickstart: sum of products, decoded greedily")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"{sum(results['meta']['seconds'].values()):.0f} s in all, seed {results['meta']['seed']}")


def write(out: Path, results: dict[str, Any], examples: Sequence[Example]) -> None:
    """Write DIR/results.json, DIR/report.md and DIR/training.png."""
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    _plot(out / "training.png", results)
    (out / "report.md").write_text(_markdown(results, examples))


def _markdown(results: dict[str, Any], examples: Sequence[Example]) -> str:
    meta = results["meta"]
    first = results["sequential"]["training"]["steps"]
    lines = [
        "# Quickstart: sequential and fork/join on the same problems",
        "",
        f"Task `{meta['task']}`, seed {meta['seed']}, {meta['problems']} held-out problems that no training set holds, "
        f"greedy decoding, {meta['threads']} CPU threads.",
        "",
        "|  | sequential | fork/join |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in table_rows(results)),
        "",
        f"Both models come from one start, trained on sequential solutions; then each was trained on the same problems "
        f"in its own style, {first} steps in all for each. A step is {BATCH} problems. A fork/join problem has more "
        "tokens (tags, outlines, joined copies of the threads), so equal steps are not equal tokens.",
        "",
        "Tokens count the response with its tags and its end token. The critical path is what must be written one "
        "after another: the text outside threads and the longest thread. Speedup in tokens is sequential tokens / "
        "critical path, a mean over all problems.",
        "",
        "![loss and token accuracy in training](training.png)",
        "",
        "## Seconds",
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in meta["seconds"].items()),
        "",
        f"Versions: {', '.join(f'{name} {number}' for name, number in meta['versions'].items())}.",
        "",
        f"Data set rows skipped: {len(meta['skipped_rows'])}.",
        *(f"- {row}" for row in meta["skipped_rows"][:20]),
        "",
    ]
    for prompt, sequential, forkjoin in examples:
        lines += ["## An example", "", f"`{prompt.strip()}`", ""]
        lines += ["Sequential:", "", "```text", sequential, "```", "", "Fork/join:", "", "```text", forkjoin, "```", ""]
    return "\n".join(lines)


def _plot(path: Path, results: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, label in (("sequential", "sequential"), ("forkjoin", "fork/join")):
        steps, losses, accuracies = zip(*results[name]["training"]["curve"], strict=True)
        left.plot(steps, losses, marker=".", label=label)
        right.plot(steps, accuracies, marker=".", label=label)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    right.set(xlabel="step", ylabel="token accuracy")
    left.legend()
    figure.savefig(path, dpi=120)
