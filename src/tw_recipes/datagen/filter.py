"""Stage 5: what becomes of a record. The blocks are put together and judged; a good trace is never lost.

    blocks left ──► siblings independent? ──► edits small? ──► format, text kept, answer right, gain ──► "forkjoin"
         └─ none ─► the trace itself, "sequential"          └─ a block that fails is dropped, a record that fails
                                                               goes on as "sequential", with the reason

Only a trace whose own answer is wrong, or that cannot be read, is "rejected".
Source: SPEC section 7, stage 5. Guarded by tests/recipes/datagen/test_filter.py and test_adversarial.py.
"""

from collections.abc import Sequence

from tw_core import check_format, parse, render
from tw_core.grammar import Block as ForkJoin
from tw_core.scanner import text_tags
from tw_recipes.datagen.layout import assembled, before, bodies_of, outside, response, saving
from tw_recipes.datagen.models import Dropped, Outlined, OutlinedBlock, Sample, Trace
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.overlap import shared_numbers, shared_runs
from tw_recipes.datagen.reasons import Reason, Rejected
from tw_recipes.datagen.rewrite import edit_ratio
from tw_recipes.evaluation.grading import Grader

_FEW_NUMBERS = 3  # siblings may always share so many


async def check_input(trace: Trace, grader: Grader, options: StageOptions) -> None:
    """Whether a trace can be used at all.

    Raises:
        Rejected: It holds tags, is too short or too long, or its answer is not right.
    """
    text = trace.reasoning + trace.answer
    if "<think>" in text or "</think>" in text or next(text_tags(text), None) is not None:
        raise Rejected(Reason.INPUT_TAGS, "the trace holds tags of the format; tags are not rewritten")
    if len(trace.reasoning) > options.max_trace_chars:
        raise Rejected(
            Reason.INPUT_LONG, f"{len(trace.reasoning)} characters, max_trace_chars={options.max_trace_chars}"
        )
    grade = await grader.grade_async(response(trace.reasoning, trace.answer), trace.truth)
    if not grade.correct:
        raise Rejected(Reason.INPUT_WRONG, f"{grade.status}: {grade.extracted!r} instead of {trace.truth!r}")


async def finish(trace: Trace, outlined: Outlined, grader: Grader, options: StageOptions) -> Sample:
    """Put a record together and judge it.

    Args:
        trace: The trace; its input was checked.
        outlined: What the stages before left of its blocks.
        grader: Grades the result.
        options: Thresholds.

    Returns:
        "forkjoin", or "sequential" with the reasons in `dropped`.
    """
    lines = Lines.of(trace.reasoning)
    dropped = list(outlined.dropped)
    blocks = []
    for block in outlined.blocks:
        try:
            check_block(trace, block, lines, options)
            blocks.append(block)
        except Rejected as problem:
            dropped.append(Dropped(reason=problem.reason, detail=problem.detail, block=block.number))
    if not blocks:
        return sequential(trace, dropped)
    trajectory = assembled(blocks, lines)
    reasoning = render(trajectory)
    text = response(reasoning, trace.answer)
    gain = acceleration(text, blocks)
    try:
        check_text(reasoning, blocks, lines)
        if gain < options.min_acceleration:
            raise Rejected(Reason.SMALL_GAIN, f"{gain:.3f}, min_acceleration={options.min_acceleration}")
        grade = await grader.grade_async(text, trace.truth)
        if not grade.correct:
            raise Rejected(Reason.ANSWER_CHANGED, f"{grade.status}: {grade.extracted!r} instead of {trace.truth!r}")
    except Rejected as problem:
        return sequential(trace, [*dropped, Dropped(reason=problem.reason, detail=problem.detail)])
    return Sample(
        place=trace.place,
        id=trace.id,
        kind="forkjoin",
        prompt=trace.question,
        text=text,
        sequential=response(trace.reasoning, trace.answer),
        answer=trace.truth,
        acceleration=round(gain, 6),
        edit_ratio=round(max(edit_ratio(bodies_of(block, lines), block.edits) for block in blocks), 6),
        threads=[len(block.threads) for block in blocks],
        dropped=dropped,
    )


def sequential(trace: Trace, dropped: Sequence[Dropped]) -> Sample:
    """The record as it came in, with why it has no block."""
    text = response(trace.reasoning, trace.answer)
    return Sample(
        place=trace.place,
        id=trace.id,
        kind="sequential",
        prompt=trace.question,
        text=text,
        sequential=text,
        answer=trace.truth,
        dropped=list(dropped),
    )


def check_block(trace: Trace, block: OutlinedBlock, lines: Lines, options: StageOptions) -> None:
    """Whether the threads of a finished block are independent and little edited, as far as code can tell.

    Raises:
        Rejected: They are not.
    """
    known = f"{trace.question}\n{before(block, lines)}"
    for number, (share, count) in enumerate(shared_numbers(block.bodies, known), 1):
        if count > _FEW_NUMBERS and share > options.max_shared_numbers:
            raise Rejected(Reason.SIBLING_NUMBERS, f"thread {number} shares {share:.0%} of its numbers")
    for number, (share, _) in enumerate(shared_runs(block.bodies, known), 1):
        if share > options.max_shared_words:
            raise Rejected(Reason.SIBLING_WORDS, f"thread {number} shares {share:.0%} of its wording")
    ratio = edit_ratio(bodies_of(block, lines), block.edits)
    if ratio > options.max_edit_ratio:
        raise Rejected(Reason.EDIT_RATIO, f"{ratio:.2f} of a thread, max_edit_ratio={options.max_edit_ratio}")


def check_text(reasoning: str, blocks: Sequence[OutlinedBlock], lines: Lines) -> None:
    """Whether fork/join text is well-formed and holds, outside of blocks, the trace byte for byte.

    Raises:
        Rejected: It is or does not.
    """
    report = check_format(reasoning, nested=False, require_block=True, canonical=True)
    if not report:
        raise Rejected(Reason.FORMAT, report.problems[0].message)
    found = parse(reasoning)
    plain = [""]
    for item in found.items:
        if isinstance(item, ForkJoin):
            plain.append("")
        else:
            plain[-1] += item
    wanted = outside(blocks, lines)
    # A block brings its own last line feed; the trace's stands after it.
    for place, block in enumerate(blocks, 1):
        if lines.lines[block.threads[-1].last_line - 1].endswith("\n"):
            wanted[place] = "\n" + wanted[place]
    if plain != wanted:
        raise Rejected(Reason.TEXT_CHANGED, "the text outside of the blocks is not that of the trace")
    bodies = [[thread.body for thread in block.threads] for block in found.blocks]
    if bodies != [[f" {body}\n" for body in block.bodies] for block in blocks]:
        raise Rejected(Reason.TEXT_CHANGED, "the threads are not those that were rewritten")


def acceleration(text: str, blocks: Sequence[OutlinedBlock]) -> float:
    """1 - critical path / length, in characters: what running every block's threads at once saves."""
    return sum(saving([len(body) for body in block.bodies]) for block in blocks) / len(text)
