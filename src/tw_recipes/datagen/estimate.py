"""The dry run: what a job would ask, how many tokens that is, and what it would cost; nothing is asked or written.

Sizes are measured on the real prompts of the first traces; what is not known before asking is assumed and said: one
block of three threads a trace, replies in proportion to the number of steps. Tokens are characters / 4.
Guarded by tests/recipes/datagen/test_generate.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, pairwise

from tw_recipes.datagen.llm import Models
from tw_recipes.datagen.models import LineRange, Sample, Step, Trace
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.prompts import QUESTIONS, Prompts

SAMPLED = 200
_THREADS = 3
_REPLY = {"steps": 900, "blocks": 300, "check": 350, "rewrite": 400, "outlines": 300}  # characters, about ten steps


@dataclass(frozen=True)
class Estimate:
    """What a job would take.

    Attributes:
        records: Readable traces.
        unreadable: Rows that would be rejected unread.
        rows: (question, model, calls, prompt tokens, reply tokens, cost) each.
        first_unreadable: Place and fault of the first such row, "" without one.
    """

    records: int
    unreadable: int
    rows: list[tuple[str, str, int, int, int, float]]
    first_unreadable: str = ""

    @property
    def tokens(self) -> int:
        """Prompt and reply, all questions."""
        return sum(prompt + reply for _, _, _, prompt, reply, _ in self.rows)

    @property
    def cost(self) -> float:
        """In the currency of the prices."""
        return sum(row[-1] for row in self.rows)

    def __str__(self) -> str:
        lines = [
            f"{self.records:,} traces ({self.unreadable:,} rows cannot be read), {len(self.rows)} questions each",
            f"{'question':<10}{'model':<28}{'calls':>9}{'prompt tokens':>16}{'reply tokens':>15}{'cost':>10}",
        ]
        lines += [
            f"{question:<10}{model:<28}{calls:>9,}{prompt:>16,}{reply:>15,}{cost:>10.2f}"
            for question, model, calls, prompt, reply, cost in self.rows
        ]
        lines.append(f"about {self.tokens:,} tokens, cost {self.cost:,.2f} at the given prices")
        lines.append(
            f"assumed: one block of {_THREADS} threads a trace, no second tries, 4 characters a token; sizes of the "
            f"first {min(self.records, SAMPLED)} traces"
        )
        return "\n".join(lines)


def estimate(traces: Iterable[Trace | Sample], prompts: Prompts, models: Models) -> Estimate:
    """Read all traces, render the questions of the first ones, and add up.

    Args:
        traces: The input.
        prompts: The questions.
        models: Names and prices.
    """
    source = iter(traces)
    head = list(islice(source, SAMPLED))
    readable = [trace for trace in head if isinstance(trace, Trace)]
    sizes = dict.fromkeys(QUESTIONS, 0)
    for trace in readable:
        for question, size in _sizes(trace, prompts).items():
            sizes[question] += size
    records, unreadable = len(readable), len(head) - len(readable)
    first = next((trace.dropped[0].detail for trace in head if isinstance(trace, Sample)), "")
    for record in source:
        records += isinstance(record, Trace)
        unreadable += isinstance(record, Sample)
    rows = []
    for question in QUESTIONS:
        model = models.of(question)
        prompt = int(sizes[question] / max(len(readable), 1) * records) // 4
        reply = _REPLY[question] * records // 4
        rows.append((question, model, records, prompt, reply, models.cost(model, prompt, reply)))
    return Estimate(records, unreadable, rows, first)


def _sizes(trace: Trace, prompts: Prompts) -> dict[str, int]:
    """Characters of each question about a trace, its thirds taken for the threads of a block."""
    lines = Lines.of(trace.reasoning)
    numbered, count = lines.numbered(), len(lines)
    cuts = [1 + count * part // (_THREADS + 1) for part in range(1, _THREADS + 2)]
    ranges = [LineRange(first_line=a, last_line=max(a, b - 1)) for a, b in pairwise(cuts)]
    steps = [Step(first_line=r.first_line, last_line=r.last_line, title="a step of it", substeps=[]) for r in ranges]
    bodies = [lines.text(r.first_line, r.last_line) for r in ranges]
    values = {
        "steps": {"numbered": numbered, "count": count},
        "blocks": {"numbered": numbered, "steps": steps},
        "check": {"numbered": numbered, "threads": ranges},
        "rewrite": {"bodies": bodies, "after": trace.answer},
        "outlines": {"before": lines.text(1, cuts[0] - 1), "bodies": bodies},
    }
    system = len(prompts.system)
    return {name: system + len(prompts.render(name, question=trace.question, **v)) for name, v in values.items()}
