"""Stage 4: one plan a thread, from which somebody who knows only what stands before the block can do its work.

Code checks what it can: one line each, no tag, no number or result or wording of any thread of the block, and no
number that stands nowhere before the block.
Source: SPEC section 7, stage 4. Guarded by tests/recipes/datagen/test_adversarial.py.
"""

from collections.abc import Sequence

from tw_core import TAGS
from tw_recipes.datagen.annotator import Annotator
from tw_recipes.datagen.layout import before
from tw_recipes.datagen.models import Dropped, Outlined, OutlinedBlock, OutlinesReply, Rewritten, RewrittenBlock, Trace
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.overlap import leaks, numbers
from tw_recipes.datagen.reasons import Reason, Rejected


async def write_outlines(trace: Trace, rewritten: Rewritten, annotator: Annotator) -> Outlined:
    """Ask, block by block, for the outlines of its threads.

    Args:
        trace: The trace.
        rewritten: Its blocks.
        annotator: Who is asked.

    Returns:
        Blocks with outlines, and those that were dropped.

    Raises:
        EndpointError: No reply came; AccessError and BudgetExhaustedError end the run.
    """
    lines = Lines.of(trace.reasoning)
    kept, dropped = [], []
    for block in rewritten.blocks:
        try:
            kept.append(await _outline(trace, before(block, lines), block, annotator))
        except Rejected as problem:
            dropped.append(Dropped(reason=problem.reason, detail=problem.detail, block=block.number))
    return Outlined(blocks=kept, dropped=dropped)


async def _outline(trace: Trace, head: str, block: RewrittenBlock, annotator: Annotator) -> OutlinedBlock:
    known = f"{trace.question}\n{head}"
    reply, problem = await annotator.ask(
        "outlines",
        OutlinesReply,
        lambda reply: check_outlines(reply, block.bodies, known, annotator.options),
        key=trace.id,
        question=trace.question,
        before=head,
        bodies=block.bodies,
    )
    if problem is not None:
        raise problem
    return OutlinedBlock(**block.model_dump(), outlines=[planned.outline.strip() for planned in reply.outlines])


def check_outlines(reply: OutlinesReply, bodies: Sequence[str], known: str, options: StageOptions) -> Rejected | None:
    """What is wrong with the outlines of a block, None if nothing is.

    Args:
        reply: The outlines.
        bodies: The threads.
        known: The question and the text before the block.
        options: `max_outline_chars`.
    """
    spoken = [planned.thread for planned in reply.outlines]
    if spoken != list(range(1, len(bodies) + 1)):
        return Rejected(Reason.OUTLINE_COUNT, f"expected outlines of threads 1 to {len(bodies)}, got {spoken}")
    for planned in reply.outlines:
        outline, where = planned.outline.strip(), f"outline {planned.thread}"
        if not outline or "\n" in outline or len(outline) > options.max_outline_chars:
            form = f"one line of 1 to {options.max_outline_chars} characters"
            return Rejected(Reason.OUTLINE_FORM, f"{where} must be {form}, got {outline[:60]!r}")
        if any(tag in outline for tag in (*TAGS, "<think>", "</think>")):
            return Rejected(Reason.OUTLINE_FORM, f"{where} holds a tag: {outline[:60]!r}")
        if (leak := leaks(outline, bodies, known)) is not None:
            return Rejected(Reason.OUTLINE_LEAK, f"{where} gives away {leak[:60]!r}")
        said = numbers(outline)
        if said and (invented := said - numbers(f"{known}\n" + "\n".join(bodies))):
            return Rejected(Reason.OUTLINE_INVENTS, f"{where} holds {sorted(invented)[0]}, which stands nowhere")
    return None
