"""The report of a run: results.json, report.md, report.html with its plots, examples.html with trajectories.

Everything is made from the stages' files, so the report of a finished run can be made again at any time.
Tests: tests/recipes/pipelines/test_reproduce.py.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tw_recipes.evaluation.report import published
from tw_recipes.pipelines.report import versions
from tw_recipes.pipelines.reproduce import plots
from tw_recipes.pipelines.reproduce.settings import Settings
from tw_recipes.pipelines.reproduce.sides import SideResult
from tw_recipes.pipelines.reproduce.stages import Stage, seconds_in
from tw_recipes.rollout import read_trajectories
from tw_recipes.viewer import page, trajectory_html

Rows = list[tuple[str, ...]]
NAMES = {"sequential": "sequential", "forkjoin": "fork/join"}


def collect(settings: Settings, start: Stage, sides: Mapping[str, SideResult]) -> dict[str, Any]:
    """The content of results.json: settings, versions, every stage of both sides, and what fork/join gains."""
    last = {name: side.evaluated[-1].figures for name, side in sides.items()}
    one, two = last["sequential"], last["forkjoin"]
    each = [base / path for base, path in zip(one["tokens"], two["latency"], strict=True)]
    right = [ratio for ratio, good in zip(each, two["correct"], strict=True) if good]
    clocks = {name: side.clock.figures["seconds_per_problem"] for name, side in sides.items()}
    found = {
        name: {
            "stages": [
                stage_figures(trained, evaluated)
                for trained, evaluated in zip(side.trained, side.evaluated, strict=True)
            ],
            "seconds_per_problem": clocks[name],
        }
        for name, side in sides.items()
    }
    made = [start, *sides["sequential"].all, *sides["forkjoin"].all]
    return {
        "settings": settings.as_json(),
        "versions": versions(),
        "start": {"seconds": start.seconds, **{k: v for k, v in start.figures.items() if k != "curve"}},
        "sides": found,
        "speedup": {
            "mean": sum(each) / len(each),
            "max_correct": max(right, default=None),
            "per_problem": each,
            "wall": {batch: clocks["sequential"][batch] / clocks["forkjoin"][batch] for batch in clocks["forkjoin"]},
        },
        "seconds": round(seconds_in(made), 1),
        "cpu_seconds": round(sum(stage.cpu_seconds for stage in made), 1),
    }


def stage_figures(trained: Stage, evaluated: Stage) -> dict[str, Any]:
    """One stage of a side, trained and evaluated, as results.json has it."""
    lists = ("correct", "latency", "tokens")
    return {
        "name": trained.name.split("-", 1)[1],
        "training": trained.figures,
        "seconds": trained.seconds,
        "evaluation_seconds": evaluated.seconds,
        **{name: value for name, value in evaluated.figures.items() if name not in lists},
    }


def summary_rows(results: Mapping[str, Any]) -> Rows:
    """(measure, sequential, fork/join) of the last stage; no clock, so that the same seed gives the same rows."""
    ends = [results["sides"][name]["stages"][-1] for name in NAMES]
    speed = results["speedup"]

    def pair(name: str, form: str) -> tuple[str, str]:
        return form.format(ends[0][name]), form.format(ends[1][name])

    accuracy = [f"{end['accuracy']:.1%} [{end['accuracy_low']:.1%}, {end['accuracy_high']:.1%}]" for end in ends]
    best = "" if speed["max_correct"] is None else f"{speed['max_correct']:.2f}x"
    return [
        ("accuracy on held-out problems", *accuracy),
        ("tokens a response", *pair("total_tokens", "{:,.1f}")),
        ("tokens on the critical path", *pair("token_latency", "{:,.1f}")),
        ("speedup in tokens, mean", "1.00x", f"{speed['mean']:.2f}x"),
        ("speedup in tokens, largest of a right answer", "", best),
        ("responses that fork", *pair("activation_ratio", "{:.1%}")),
        ("well-formed and finished", *pair("format_correctness", "{:.1%}")),
    ]


def clock_rows(results: Mapping[str, Any]) -> Rows:
    """(problems in flight, sequential, fork/join, speedup)."""
    one, two = (results["sides"][name]["seconds_per_problem"] for name in NAMES)
    wall = results["speedup"]["wall"]
    return [(batch, f"{one[batch]:.3f} s", f"{two[batch]:.3f} s", f"{wall[batch]:.2f}x") for batch in wall]


def stage_rows(results: Mapping[str, Any]) -> Rows:
    """A row for each stage of each side."""
    found = []
    for name, title in NAMES.items():
        for stage in results["sides"][name]["stages"]:
            right = stage["threads_right"]
            training = stage["training"]
            kept = f"{training['kept']}/{training['decoded']}" if "kept" in training else ""
            found.append(
                (
                    title,
                    stage["name"],
                    f"{stage['accuracy']:.1%}",
                    f"{stage['token_latency']:,.1f}",
                    f"{stage['activation_ratio']:.1%}",
                    f"{stage['format_correctness']:.1%}",
                    *("" if right[which] is None else f"{right[which]:.1%}" for which in ("first", "later")),
                    str(training["steps"]),
                    f"{training['tokens']:,}" if "tokens" in training else "",
                    kept,
                    f"{stage['seconds']:.0f}",
                )
            )
    return found


STAGE_HEADS = (
    *("side", "stage", "accuracy", "critical path", "responses that fork", "well-formed"),
    *("first threads right", "later threads right", "steps", "tokens computed", "kept", "seconds"),
)


def published_rows(results: Mapping[str, Any]) -> Rows:
    """(source, sequential accuracy, ours or theirs in parallel, tokens of both, speedup)."""
    one, two = (results["sides"][name]["stages"][-1] for name in NAMES)
    ours = (
        f"this run: {results['settings']['task']}",
        f"{one['accuracy']:.1%}",
        f"{two['accuracy']:.1%}",
        f"{one['total_tokens']:,.0f}",
        f"{two['token_latency']:,.0f}",
        f"{results['speedup']['mean']:.2f}x",
    )
    return [ours, *(tuple(row) for row in published()["comparisons"])]


PUBLISHED_HEADS = ("", "accuracy, sequential", "accuracy, parallel", "tokens, sequential", "critical path", "speedup")
DIFFERENCES = (
    "Ours trains a small model from scratch, on digits with labels that make copying a look-up; the paper fine-tunes "
    "Qwen3-8B on text.",
    "Both of our sides start from the same weights, see the same problems and take the same number of steps. A "
    "fork/join problem has more tokens (tags, outlines, joined copies), so equal steps are not equal tokens.",
    "Ours trains each generated token once, from its parent in the trie; the published code also puts loss on injected "
    "headers and on joined copies (`--leaky-loss` does that here).",
    "Both evaluate at temperature 0.6 and top-p 0.95; wall clock is measured with greedy decoding here.",
)


def write(out: Path, results: Mapping[str, Any], sides: Mapping[str, SideResult], problems: Sequence[Any]) -> None:
    """Write results.json, report.md, report.html, examples.html and the plots.

    Args:
        out: Folder of the run.
        results: Of `collect`.
        sides: The stages.
        problems: The held-out problems.
    """
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    made = [
        plots.accuracy_latency(out / "accuracy_latency", results),
        plots.training(out / "training", sides),
        plots.reinforcement(out / "reinforcement", sides),
        plots.speedup(out / "speedup", results["speedup"]["per_problem"], results["speedup"]["mean"]),
    ]
    if results["speedup"]["wall"]:
        made.append(plots.wall_clock(out / "wall_clock", results))
    (out / "report.md").write_text(_markdown(results, made), encoding="utf-8")
    (out / "report.html").write_text(_html(results, made), encoding="utf-8")
    (out / "examples.html").write_text(_examples(sides, problems), encoding="utf-8")


def sections(results: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], Rows]]:
    """The tables of the report: (title, heads, rows); one without rows, as where no clock was read, is left out."""
    tables = [
        ("Sequential and fork/join", ("", *NAMES.values()), summary_rows(results)),
        ("Wall clock per problem", ("problems in flight", *NAMES.values(), "speedup"), clock_rows(results)),
        ("Stage by stage", STAGE_HEADS, stage_rows(results)),
        ("Beside the published figures", PUBLISHED_HEADS, published_rows(results)),
    ]
    return [table for table in tables if table[2]]


def intro(results: Mapping[str, Any]) -> str:
    """One paragraph: what ran, with which ablations."""
    settings = results["settings"]
    training, rl = settings["training"], settings["reinforcement"]
    ablations = {
        "rewards divided by their deviation": rl["std_normalisation"],
        "loss on joined copies": training["leaky_loss"],
        "nested blocks": settings["nested"],
        f"acceleration weight {rl['rho']:g}": rl["rho"] != 0.5,
        f"{settings['self_training']['rounds']} rounds of self-training": settings["self_training"]["rounds"] != 1,
        "no reinforcement learning": not rl["steps"],
    }
    chosen = ", ".join(name for name, on in ablations.items() if on) or "none"
    return (
        f"Task `{settings['task']}`, seed {settings['seed']}, a model of {results['start']['parameters']:,} parameters "
        f"from scratch on {settings['device']}; {settings['evaluation']['problems']} held-out problems that no "
        f"training set holds, temperature {settings['evaluation']['temperature']:g}. Changed from the "
        f"method: {chosen}. {results['seconds']:.0f} s in all, {results['cpu_seconds']:.0f} s of CPU time."
    )


def _markdown(results: Mapping[str, Any], made: Sequence[Path]) -> str:
    lines = ["# Reproduction: sequential and fork/join on the same problems", "", intro(results), ""]
    for title, heads, rows in sections(results):
        lines += [f"## {title}", "", _line(heads), "|---" * len(heads) + "|", *map(_line, rows), ""]
    lines += ["What differs from the published runs:", "", *(f"- {text}" for text in DIFFERENCES), ""]
    lines += [f"![{path.stem}]({path.with_suffix('.png').name})" for path in made]
    lines += ["", "Trajectories to look at: [examples.html](examples.html).", ""]
    lines += [f"Versions: {', '.join(f'{name} {number}' for name, number in results['versions'].items())}.", ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html(results: Mapping[str, Any], made: Sequence[Path]) -> str:
    parts = [f"<p>{escape(intro(results))}</p>"]
    for title, heads, rows in sections(results):
        body = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
        body += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        parts.append(f"<h2>{escape(title)}</h2><table>{''.join(f'<tr>{row}</tr>' for row in body)}</table>")
    parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in DIFFERENCES) + "</ul>")
    for path in made:
        svg = path.with_suffix(".svg").read_text(encoding="utf-8")
        parts.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    parts.append('<p><a href="examples.html">Trajectories of the last models</a></p>')
    return page("Reproduction: sequential and fork/join on the same problems", parts)


def _examples(sides: Mapping[str, SideResult], problems: Sequence[Mapping[str, str]], count: int = 6) -> str:
    """Responses of both last models to the first problems, and to those that fork/join got wrong."""
    wrong = [i for i, right in enumerate(sides["forkjoin"].evaluated[-1].figures["correct"]) if not right]
    parts = []
    trajectories = {
        name: {int(row["id"]): row for row in read_trajectories(side.evaluated[-1].folder / "trajectories.jsonl")}
        for name, side in sides.items()
    }
    for place in dict.fromkeys([*range(min(count, len(problems))), *wrong[:count]]):
        parts.append(f"<h2>{escape(problems[place]['prompt'].strip())}</h2>")
        for name, title in NAMES.items():
            row = trajectories[name][place]
            right = sides[name].evaluated[-1].figures["correct"][place]
            stats = {"": "right" if right else "wrong", "T": row["stats"]["total_tokens"], "L": row["token_latency"]}
            parts.append(trajectory_html(row["text"], title=title, stats=stats, opened=place == 0))
    return page("Example trajectories", parts)
