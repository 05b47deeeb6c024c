"""Stage 1: the steps of a trace, as line ranges without gaps.

The annotator sees the trace with line numbers; code checks that main steps cover every line once, in order, and that
the sub-steps of a step cover its lines likewise.
Source: SPEC section 7, stage 1. Guarded by tests/recipes/datagen/test_adversarial.py.
"""

from collections.abc import Sequence

from tw_recipes.datagen.annotator import Annotator
from tw_recipes.datagen.models import LineRange, Steps, StepsReply, Trace
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.reasons import Reason, Rejected


async def extract_steps(trace: Trace, annotator: Annotator) -> Steps:
    """Ask for the steps of a trace.

    Args:
        trace: A correct sequential trace.
        annotator: Who is asked.

    Returns:
        Steps that cover every line of `trace.reasoning`.

    Raises:
        Rejected: No reply covers the trace.
        EndpointError: No reply came; AccessError and BudgetExhaustedError end the run.
    """
    lines = Lines.of(trace.reasoning)
    reply, problem = await annotator.ask(
        "steps",
        StepsReply,
        lambda reply: check_steps(reply, len(lines)),
        key=trace.id,
        question=trace.question,
        numbered=lines.numbered(),
        count=len(lines),
    )
    if problem is not None:
        raise problem
    return Steps(steps=reply.steps)


def check_steps(reply: StepsReply, count: int) -> Rejected | None:
    """What is wrong with steps over `count` lines, None if nothing is."""
    problem = _cover(reply.steps, 1, count, "the steps")
    for place, step in enumerate(reply.steps, 1):
        if problem is None and step.substeps:
            problem = _cover(step.substeps, step.first_line, step.last_line, f"the sub-steps of step {place}")
    return problem


def boundaries(steps: Steps) -> tuple[set[int], set[int]]:
    """(first lines, last lines) of all steps and sub-steps: where a thread may begin and end."""
    ranges: list[LineRange] = [part for step in steps.steps for part in (step, *step.substeps)]
    return {part.first_line for part in ranges}, {part.last_line for part in ranges}


def _cover(ranges: Sequence[LineRange], first: int, last: int, what: str) -> Rejected | None:
    expected = first
    for part in ranges:
        span = f"L{part.first_line}-L{part.last_line}"
        if part.last_line < part.first_line or part.first_line < first or part.last_line > last:
            return Rejected(Reason.STEPS_RANGE, f"{what} must lie within L{first}-L{last}, got {span}")
        if part.first_line > expected:
            return Rejected(Reason.STEPS_GAP, f"{what} leave out L{expected}-L{part.first_line - 1}")
        if part.first_line < expected:
            return Rejected(Reason.STEPS_OVERLAP, f"{what} must go on at L{expected}, got {span}")
        expected = part.last_line + 1
    if expected != last + 1:
        return Rejected(Reason.STEPS_GAP, f"{what} leave out L{expected}-L{last}")
    return None
