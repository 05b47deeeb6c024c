"""What became of a job's records: counts by reason with examples, measures, cost; as JSON, Markdown and plots.

Records are streamed; held are counters, a few examples a reason, and histograms.
Guarded by tests/recipes/datagen/test_report.py.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tw_recipes.datagen.accounting import Usage
from tw_recipes.datagen.mix import Mix
from tw_recipes.datagen.reasons import EXPLAINED, Reason

EXAMPLES = 3
_EDGES = np.linspace(0, 1, 41)


@dataclass
class Findings:
    """Counts over all records.

    Attributes:
        kinds: Records by kind.
        reasons: Dropped records and blocks by reason.
        examples: (id, detail) of the first of each reason.
        threads: Blocks by number of threads.
        gains: Histogram of the acceleration of fork/join samples, bins of 0.025.
        edits: Histogram of their edit ratio.
        gain_sum: Sum of the accelerations.
        repairs: Proposed ranges that were reversed or ran past the trace, and were put right.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    threads: Counter[int] = field(default_factory=Counter)
    gains: np.ndarray = field(default_factory=lambda: np.zeros(len(_EDGES) - 1, dtype=np.int64))
    edits: np.ndarray = field(default_factory=lambda: np.zeros(len(_EDGES) - 1, dtype=np.int64))
    gain_sum: float = 0.0
    repairs: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record, a dict of `Sample`."""
        self.kinds[record["kind"]] += 1
        self.repairs += record["repairs"]
        for dropped in record["dropped"]:
            self.reasons[dropped["reason"]] += 1
            found = self.examples.setdefault(dropped["reason"], [])
            if len(found) < EXAMPLES:
                found.append((record["id"], dropped["detail"]))
        if record["kind"] == "forkjoin":
            self.threads.update(record["threads"])
            self.gain_sum += record["acceleration"]
            self.gains[_bin(record["acceleration"])] += 1
            self.edits[_bin(record["edit_ratio"])] += 1

    @property
    def mean_gain(self) -> float:
        """Mean acceleration of fork/join samples, in characters."""
        return self.gain_sum / max(self.kinds["forkjoin"], 1)


def _bin(value: float) -> int:
    return int(np.clip(np.searchsorted(_EDGES, value, "right") - 1, 0, len(_EDGES) - 2))


def write_report(
    folder: Path,
    records: Iterable[Mapping[str, Any]],
    usage: Mapping[tuple[str, str], Usage],
    mix: Mix | None,
    *,
    stopped: str = "",
) -> Findings:
    """Write report.json, report.md, reasons.png and gains.png.

    Args:
        folder: Where to.
        records: All records, failures included, as dicts of `Sample`.
        usage: Calls, tokens and money by (question, model).
        mix: What the data set was made of, None if there is none.
        stopped: Why the run ended early.
    """
    found = Findings()
    for record in records:
        found.add(record)
    data = {
        "kinds": dict(sorted(found.kinds.items())),
        "stopped": stopped,
        "repairs": found.repairs,
        "mix": None if mix is None else vars(mix),
        "mean_acceleration": round(found.mean_gain, 6),
        "threads_per_block": {str(n): count for n, count in sorted(found.threads.items())},
        "reasons": {
            reason: {
                "count": count,
                "meaning": EXPLAINED[Reason(reason)],
                "examples": [{"id": name, "detail": detail} for name, detail in found.examples[reason]],
            }
            for reason, count in found.reasons.most_common()
        },
        "usage": [
            {"question": question, "model": model, **vars(spent)} for (question, model), spent in sorted(usage.items())
        ],
    }
    (folder / "report.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(found, usage, mix, stopped), encoding="utf-8")
    _plots(folder, found)
    return found


def _markdown(found: Findings, usage: Mapping[tuple[str, str], Usage], mix: Mix | None, stopped: str) -> str:
    lines = ["# Data generation", ""]
    if stopped:
        lines += [f"Stopped early: {stopped}", ""]
    lines += ["| records | count |", "|---|---|"]
    lines += [f"| {kind} | {count:,} |" for kind, count in sorted(found.kinds.items())]
    if mix is not None:
        lines += [
            "",
            f"The data set has {mix.forkjoin + mix.sequential:,} rows: {mix.forkjoin:,} fork/join (mean acceleration "
            f"{found.mean_gain:.1%} in characters) and {mix.sequential:,} sequential, {mix.turned:,} of them turned "
            f"from fork/join samples; {mix.surplus:,} sequential traces were left out.",
        ]
    if found.repairs:
        lines += [
            "",
            f"{found.repairs:,} proposed ranges were written backwards or ran past the trace, and were put right.",
        ]
    lines += ["", "| reason | count | meaning | first examples |", "|---|---|---|---|"]
    for reason, count in found.reasons.most_common():
        shown = "<br>".join(f"{name}: {_cell(detail)}" for name, detail in found.examples[reason])
        lines.append(f"| {reason} | {count:,} | {EXPLAINED[Reason(reason)]} | {shown} |")
    lines += ["", "![reasons](reasons.png) ![gains](gains.png)", ""]
    lines += ["| question | model | calls | failed attempts | prompt tokens | reply tokens | cost |", "|" + "---|" * 7]
    total = Usage()
    for (question, model), spent in sorted(usage.items()):
        total.add(spent)
        lines.append(_usage_row(question, model, spent))
    return "\n".join([*lines, _usage_row("all", "", total), ""])


def _usage_row(question: str, model: str, usage: Usage) -> str:
    tokens = f"{usage.prompt_tokens:,} | {usage.completion_tokens:,}"
    return f"| {question} | {model} | {usage.calls:,} | {usage.failed:,} | {tokens} | {usage.cost:,.4f} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")[:160]


def _plots(folder: Path, found: Findings) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.3 * max(len(found.reasons), 1)), layout="constrained")
    axes = figure.subplots()
    ranked = found.reasons.most_common()[::-1]
    axes.barh([reason for reason, _ in ranked], [count for _, count in ranked], color="#4477aa")
    axes.set(xlabel="dropped records and blocks", title="Reasons")
    figure.savefig(folder / "reasons.png", dpi=120)

    figure = Figure(figsize=(9, 3), layout="constrained")
    gains, edits, threads = figure.subplots(1, 3)
    middle = (_EDGES[:-1] + _EDGES[1:]) / 2
    gains.bar(middle, found.gains, width=0.024, color="#228833")
    gains.set(xlabel="acceleration (characters)", ylabel="fork/join samples")
    edits.bar(middle, found.edits, width=0.024, color="#ccbb44")
    edits.set(xlabel="edited share of a thread")
    sizes = sorted(found.threads)
    threads.bar(sizes, [found.threads[size] for size in sizes], color="#aa3377")
    threads.set(xlabel="threads of a block", xticks=sizes)
    figure.savefig(folder / "gains.png", dpi=120)
