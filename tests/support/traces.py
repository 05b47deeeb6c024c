"""Sequential traces of the sum-of-products task, as the data generator reads them."""

from pathlib import Path

from tw_recipes.data import write_jsonl
from tw_recipes.datagen.models import Trace
from tw_recipes.tasks import get_task


def traces(count: int, *, seed: int = 0, offset: int = 0) -> list[Trace]:
    """Traces of the task's sequential solutions."""
    found = []
    rows = get_task("products").rows(count, seed=seed, style="sequential", offset=offset)
    for place, row in enumerate(rows):
        reasoning, answer = row["text"].removeprefix("<think>\n").split("</think>\n\n")
        found.append(
            Trace(
                place=place,
                id=f"t{place}",
                question=row["prompt"],
                reasoning=reasoning,
                answer=answer,
                truth=row["answer"],
            )
        )
    return found


def trace_file(path: Path, count: int, *, seed: int = 0, offset: int = 0) -> Path:
    """A JSONL file of traces with the default columns."""
    return write_jsonl(
        path,
        (
            {"question": t.question, "reasoning": t.reasoning, "answer": t.answer, "ground_truth": t.truth}
            for t in traces(count, seed=seed, offset=offset)
        ),
    )
