"""Stage 2: which steps can run side by side; proposed, checked in code, checked again by the model.

A block whose self-check fails is dropped: its lines stay where they are, as plain text. Blocks are judged one by one,
so that one bad proposal does not cost the others.
Source: SPEC section 7, stage 2. Guarded by tests/recipes/datagen/test_adversarial.py and test_recorded.py.
"""

from collections.abc import Sequence

from tw_recipes.datagen.annotator import Annotator
from tw_recipes.datagen.layout import disjoint, placed
from tw_recipes.datagen.models import Block, Blocks, BlocksReply, CheckReply, Dropped, ProposedBlock, Steps, Trace
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.reasons import Reason, Rejected
from tw_recipes.datagen.steps import boundaries


async def propose_blocks(trace: Trace, steps: Steps, annotator: Annotator) -> Blocks:
    """Ask for blocks, and for each that stands up, whether its threads are independent and whole.

    Args:
        trace: The trace.
        steps: Its steps.
        annotator: Who is asked.

    Returns:
        Blocks that passed every check, and the others with their reasons. None at all is an answer too.

    Raises:
        Rejected: No reply has the right shape.
        EndpointError: No reply came; AccessError and BudgetExhaustedError end the run.
    """
    lines, options = Lines.of(trace.reasoning), annotator.options
    numbered = lines.numbered()
    reply, _ = await annotator.ask(
        "blocks",
        BlocksReply,
        lambda reply: _first_problem(validated(reply.blocks, steps, lines, options)),
        key=trace.id,
        question=trace.question,
        numbered=numbered,
        steps=steps.steps,
    )
    found = validated(reply.blocks, steps, lines, options)
    kept, dropped = [], list(found.dropped)
    for block in found.blocks:
        try:
            await _check_block(trace, numbered, block, annotator)
            kept.append(block)
        except Rejected as problem:
            dropped.append(Dropped(reason=problem.reason, detail=problem.detail, block=block.number))
    return Blocks(blocks=kept, dropped=dropped, repairs=found.repairs)


def validated(proposed: Sequence[ProposedBlock], steps: Steps | None, lines: Lines, options: StageOptions) -> Blocks:
    """Place proposed blocks and say what is wrong with those that cannot stand.

    Args:
        proposed: The annotator's blocks.
        steps: Threads must consist of whole steps or sub-steps of these; None does not ask for that.
        lines: The trace.
        options: Thresholds.
    """
    blocks, dropped, repairs = [], [], 0
    for number, proposal in enumerate(proposed, 1):
        try:
            block, repaired = placed(number, proposal.threads, lines, options, proposal.why)
            if steps is not None:
                _on_steps(block, steps, lines)
        except Rejected as problem:
            dropped.append(Dropped(reason=problem.reason, detail=problem.detail, block=number))
            continue
        blocks.append(block)
        repairs += repaired
    kept, overlapping = disjoint(blocks)
    for block in overlapping:
        detail = f"L{block.threads[0].first_line} belongs to the block before"
        dropped.append(Dropped(reason=Reason.BLOCK_OVERLAP, detail=detail, block=block.number))
    return Blocks(blocks=kept, dropped=dropped, repairs=repairs)


def check_verdicts(reply: CheckReply, threads: int) -> Rejected | None:
    """Whether a self-check speaks of each of so many threads once; what it says is another matter."""
    spoken = sorted(verdict.thread for verdict in reply.verdicts)
    if spoken != list(range(1, threads + 1)):
        return Rejected(Reason.CHECK_MISMATCH, f"expected one verdict for each of {threads} threads, got {spoken}")
    return None


async def _check_block(trace: Trace, numbered: str, block: Block, annotator: Annotator) -> None:
    reply, problem = await annotator.ask(
        "check",
        CheckReply,
        lambda reply: check_verdicts(reply, len(block.threads)),
        key=trace.id,
        question=trace.question,
        numbered=numbered,
        threads=block.threads,
    )
    if problem is not None:
        raise problem
    for verdict in reply.verdicts:
        if verdict.uses_threads:
            raise Rejected(
                Reason.CHECK_DEPENDENT, f"thread {verdict.thread} uses {verdict.uses_threads}: {verdict.why}"
            )
        if not verdict.complete:
            raise Rejected(Reason.CHECK_INCOMPLETE, f"thread {verdict.thread} is a fragment: {verdict.why}")


def _on_steps(block: Block, steps: Steps, lines: Lines) -> None:
    """Threads must begin where a step does and end where one does, blank lines apart."""
    firsts, lasts = boundaries(steps)
    for thread in block.threads:
        begin, end = thread.first_line, thread.last_line
        while begin not in firsts and begin > 1 and lines.blank(begin - 1, begin - 1):
            begin -= 1
        while end not in lasts and end < len(lines) and lines.blank(end + 1, end + 1):
            end += 1
        if begin not in firsts or end not in lasts:
            raise Rejected(
                Reason.BLOCK_OFF_STEP, f"L{thread.first_line}-L{thread.last_line} is not made of whole steps"
            )


def _first_problem(found: Blocks) -> Rejected | None:
    return Rejected(found.dropped[0].reason, found.dropped[0].detail) if found.dropped else None
