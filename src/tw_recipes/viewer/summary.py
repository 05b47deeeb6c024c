"""Figures over the trajectories of a file, for the page and for the terminal.

Guarded by tests/recipes/viewer/test_summary.py.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tw_recipes.viewer.measures import Measures


@dataclass
class Summary:
    """What `add` has seen; memory for a few numbers a trajectory.

    Attributes:
        count: Trajectories.
        texts: Those with text, whose format is known.
        well_formed: Of these the well-formed ones.
        statuses: How many rollouts have each status.
        figures: Each known figure, of each trajectory that has it.
        no_trie: Why trajectories have no trie, and how many.
    """

    count: int = 0
    texts: int = 0
    well_formed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    figures: dict[str, list[float]] = field(default_factory=dict)
    no_trie: Counter[str] = field(default_factory=Counter)

    def add(self, found: Measures) -> None:
        """Count one trajectory."""
        self.count += 1
        self.texts += found.well_formed is not None
        self.well_formed += bool(found.well_formed)
        if found.status is not None:
            self.statuses[found.status.split(":")[0]] += 1
        values = {"T": found.total_tokens, "L": found.token_latency, "acceleration": found.acceleration}
        values |= {"blocks": found.blocks, "threads": found.threads}
        if found.trie is not None:
            values |= {"rows": found.trie.num_tokens, "expanded": found.trie.num_expanded_tokens}
            values |= {"trained": int(found.trie.weights.sum())}
        else:
            self.no_trie[found.no_trie.split(":")[0]] += 1
        for name, value in values.items():
            if value is not None:
                self.figures.setdefault(name, []).append(value)

    def lines(self) -> list[tuple[str, str]]:
        """(name, value) pairs; what is not known is left out."""
        lines = [("trajectories", f"{self.count:,}")]
        if self.statuses:
            lines.append(("status", ", ".join(f"{name} {count:,}" for name, count in self.statuses.most_common())))
        if self.texts:
            lines.append(
                ("well-formed", f"{self.well_formed:,} of {self.texts:,} ({self.well_formed / self.texts:.1%})")
            )
        figures = {name: np.asarray(values) for name, values in self.figures.items()}
        for name, label in (("T", "tokens T"), ("L", "critical path L")):
            if name in figures:
                lines.append((label, _spread(figures[name])))
        if "acceleration" in figures:
            lines.append(("acceleration 1 - L/T", f"mean {figures['acceleration'].mean():.3f}"))
        if "blocks" in figures:
            blocks, threads = figures["blocks"], figures["threads"]
            lines.append(("with a block", f"{(blocks > 0).mean():.1%}"))
            each = f", {threads.sum() / blocks.sum():.2f} threads each" if blocks.sum() else ""
            lines.append(("blocks", f"mean {blocks.mean():.2f}{each}"))
        if "rows" in figures:
            rows, expanded = figures["rows"].sum(), figures["expanded"].sum()
            lines.append(("trie rows", _spread(figures["rows"])))
            lines.append(
                ("sharing ratio r", f"{expanded / rows:.2f} ({expanded:,.0f} expanded tokens in {rows:,.0f} rows)")
            )
            lines.append(("trained tokens", f"{figures['trained'].sum():,.0f}"))
        for reason, count in self.no_trie.most_common(3):
            lines.append(("without a trie", f"{count:,}: {reason}"))
        return lines


def summarize(found: Iterable[Measures]) -> Summary:
    """The summary of measured trajectories."""
    summary = Summary()
    for one in found:
        summary.add(one)
    return summary


def _spread(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:,.0f}"
    middle, high = np.percentile(values, [50, 95])
    return f"mean {values.mean():,.1f}, median {middle:,.0f}, 95 % {high:,.0f}, max {values.max():,.0f}"
