"""What an evaluation leaves: results.json, table.md, plots and report.html.

Guarded by tests/recipes/evaluation/test_evaluate.py.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tw_recipes.evaluation.benchmarks import BENCHMARKS
from tw_recipes.evaluation.metrics import Sample, Speedup, by_problem
from tw_recipes.viewer import page, trajectory_html

Records = list[dict[str, Any]]

UNITS = {"token_latency": "tokens", "total_tokens": "tokens", "wall_s": "s", "wall_s_p95": "s", "run_s": "s"}
_ROWS = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("pass_at_n", "pass@n", "{:.1%}"),
    ("total_tokens", "total tokens", "{:,.0f}"),
    ("token_latency", "token latency", "{:,.0f}"),
    ("speedup_mean", "mean speedup", "{:.2f}"),
    ("speedup_mean_correct", "mean speedup (correct)", "{:.2f}"),
    ("speedup_max_correct", "max speedup (correct)", "{:.2f}"),
    ("speedup_wall", "mean speedup in wall clock", "{:.2f}"),
    ("activation_ratio", "activation ratio", "{:.1%}"),
    ("threads_per_block", "threads per block", "{:.2f}"),
    ("format_correctness", "format correctness", "{:.1%}"),
    ("finished", "finished by themselves", "{:.1%}"),
    ("ungraded", "not graded (time-out, error)", "{:.1%}"),
    ("wall_s", "wall clock per problem, s", "{:.2f}"),
)


@cache
def published() -> dict[str, Any]:
    """The published figures with their source (published.json, the only place that has them)."""
    return json.loads(files("tw_recipes.evaluation").joinpath("published.json").read_text(encoding="utf-8"))


def records(case: str, impl: str, metrics: Mapping[str, float | None]) -> Records:
    """Metrics as records of a results file; None is left out."""
    return [
        {"case": case, "impl": impl, "metric": name, "value": value, "unit": UNITS.get(name, "1")}
        for name, value in metrics.items()
        if value is not None
    ]


def published_records(case: str) -> Records:
    """The published figures of a data set as records; empty when it is none of theirs."""
    found = []
    for impl, metrics in published()["rows"].items():
        values = {name: by_set[case] for name, by_set in metrics.items() if case in by_set}
        found += records(case, f"published: Qwen3-8B {impl}", values)
    return found


def markdown_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of results in the published layout: a row per measure and model, a column per data set.

    Args:
        found: Records of one or more evaluations. Data sets of the paper come first, in its order.
    """
    order = [*BENCHMARKS, *dict.fromkeys(r["case"] for r in found)]
    cases = [case for case in dict.fromkeys(order) if any(r["case"] == case for r in found)]
    impls = list(dict.fromkeys(r["impl"] for r in found))
    values = {(r["case"], r["impl"], r["metric"]): r["value"] for r in found}
    titles = [BENCHMARKS[case].title if case in BENCHMARKS else case for case in cases]
    average = len(cases) > 1
    heads = ["", *titles, *(["Avg"] if average else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for metric, name, form in _ROWS:
        for impl in impls:
            numbers = [values.get((case, impl, metric)) for case in cases]
            if all(number is None for number in numbers):
                continue
            cells = [_cell(values, case, impl, metric, form) for case in cases]
            known = [number for number in numbers if number is not None]
            # A maximum has no average; an average over some columns would mislead.
            mean = len(known) == len(numbers) and "max" not in metric
            tail = [form.format(sum(known) / len(known)) if mean else ""] if average else []
            lines.append("| " + " | ".join([f"{name}, {impl}", *cells, *tail]) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Mapping[Any, float], case: str, impl: str, metric: str, form: str) -> str:
    value = values.get((case, impl, metric))
    if value is None:
        return ""
    low, high = (values.get((case, impl, f"accuracy_{end}")) for end in ("low", "high"))
    if metric == "accuracy" and low is not None and high is not None:
        return f"{form.format(value)} [{low:.1%}, {high:.1%}]"
    return form.format(value)


def plot_latency(path: Path, found: Sequence[Mapping[str, Any]], case: str) -> None:
    """Accuracy over token latency, a point per model with its interval; PNG and SVG."""
    values = {(r["impl"], r["metric"]): r["value"] for r in found if r["case"] == case}
    figure, axes = _figure()
    for place, impl in enumerate(dict.fromkeys(r["impl"] for r in found if r["case"] == case)):
        x, y = values.get((impl, "token_latency")), values.get((impl, "accuracy"))
        if x is None or y is None:
            continue
        low, high = values.get((impl, "accuracy_low"), y), values.get((impl, "accuracy_high"), y)
        marker = "x" if impl.startswith("published") else "o"
        errors = [[100 * max(0.0, y - low)], [100 * max(0.0, high - y)]]
        axes.errorbar([x], [100 * y], yerr=errors, fmt=marker, capsize=3, color=f"C{place}", label=impl)
    axes.set(xlabel="token latency (tokens on the critical path)", ylabel="accuracy, %", title=case)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    _save(figure, path)


def plot_speedup(path: Path, speedup: Speedup, case: str) -> None:
    """Histogram of the speedup per problem, with its mean; PNG and SVG."""
    figure, axes = _figure()
    values = list(speedup.per_problem.values())
    axes.hist(values, bins=min(30, max(5, len(values) // 3)), color="#4c86c6", edgecolor="white")
    axes.axvline(speedup.mean, color="#c4572b", label=f"mean {speedup.mean:.2f}x")
    axes.axvline(1.0, color="gray", linestyle=":", label="no speedup")
    axes.set(xlabel="sequential tokens / critical path", ylabel="problems", title=f"{case}: speedup per problem")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    # The object interface: no global state, no display, safe in threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)


def html_report(
    title: str,
    found: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    plots: Sequence[Path],
    samples: Sequence[Sample],
    examples: Sequence[Mapping[str, Any]],
) -> str:
    """The self-contained page: table, notes, plots, problems, example trajectories as lanes.

    Args:
        title: Heading.
        found: Records, as for `markdown_table`.
        notes: Sentences on how the numbers were made.
        plots: SVG files, embedded.
        samples: All graded samples.
        examples: Lines of the file of trajectories, with "text" and "stats".
    """
    parts = [_html_table(markdown_table(found)), "".join(f"<p class=stats>{escape(note)}</p>" for note in notes)]
    for plot in plots:
        svg = plot.with_suffix(".svg").read_text(encoding="utf-8")
        parts.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    parts.append("<h2>Problems</h2>" + _problem_table(samples))
    verdicts = {(s.problem, s.sample): s for s in samples}
    parts.append("<h2>Trajectories</h2>" if examples else "")
    for place, row in enumerate(examples):
        sample, stats = verdicts[row["id"], row["sample"]], row["stats"]
        shown = {
            "": "correct" if sample.correct else "wrong",
            "answer": sample.extracted,
            "T": stats["total_tokens"],
            "L": row["token_latency"],
            "blocks": row["forks"],
            "status": row["status"],
        }
        head = f"{row['key']}: {row.get('question', '')}"[:160]
        parts.append(trajectory_html(row["text"], title=head, stats=shown, opened=place == 0))
    return page(title, [part for part in parts if part])


def _html_table(markdown: str) -> str:
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().split("\n")]
    rows = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    rows += ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in body]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _problem_table(samples: Sequence[Sample], limit: int = 1000) -> str:
    groups = by_problem(samples)
    rows = ["<tr><th>problem</th><th>correct</th><th>T</th><th>L</th><th>blocks</th><th>seconds</th></tr>"]
    for name, group in list(groups.items())[:limit]:
        n, right = len(group), sum(s.correct for s in group)
        fields = ("total_tokens", "critical_path_tokens", "num_blocks", "seconds")
        means = [sum(getattr(s, field) for s in group) / n for field in fields]
        mark = "right" if right else "wrong"
        cells = f"<td>{means[0]:,.0f}</td><td>{means[1]:,.0f}</td><td>{means[2]:.1f}</td><td>{means[3]:.2f}</td>"
        rows.append(f"<tr><td>{escape(name)}</td><td class={mark}>{right}/{n}</td>{cells}</tr>")
    more = f"<p class=stats>The first {limit} of {len(groups)} problems.</p>" if len(groups) > limit else ""
    return f"<details><summary>{len(groups)} problems</summary><table>{''.join(rows)}</table>{more}</details>"
