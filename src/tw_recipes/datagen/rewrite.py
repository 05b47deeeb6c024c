"""Stage 3: threads that speak of each other are made to stand alone, by the smallest exact replacements.

An edit names text that its thread holds exactly once; it is applied there or the block is dropped. Edits are measured
without what `find` and `replace` have in common at their ends, so that neighbouring words taken in to make `find`
unique cost nothing. Text outside of threads is never edited: the annotator only says whether it still makes sense.
Source: SPEC section 7, stage 3. Guarded by tests/recipes/datagen/test_adversarial.py.
"""

from collections.abc import Sequence

from tw_core import TAGS
from tw_recipes.datagen.annotator import Annotator
from tw_recipes.datagen.layout import after, before, bodies_of
from tw_recipes.datagen.models import Block, Blocks, Dropped, Edit, RewriteReply, RewrittenBlock, Trace
from tw_recipes.datagen.models import Rewritten as RewrittenBlocks
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.overlap import all_numbers
from tw_recipes.datagen.reasons import Reason, Rejected


async def rewrite_threads(trace: Trace, blocks: Blocks, annotator: Annotator) -> RewrittenBlocks:
    """Ask, block by block, for the edits that remove references between its threads.

    The annotator sees all threads of the block at once and the text after the join.

    Args:
        trace: The trace.
        blocks: Its checked blocks.
        annotator: Who is asked.

    Returns:
        Blocks with the text of their threads, and those that were dropped.

    Raises:
        EndpointError: No reply came; AccessError and BudgetExhaustedError end the run.
    """
    lines = Lines.of(trace.reasoning)
    kept, dropped = [], []
    for block in blocks.blocks:
        try:
            kept.append(await _rewrite(trace, lines, block, annotator))
        except Rejected as problem:
            dropped.append(Dropped(reason=problem.reason, detail=problem.detail, block=block.number))
    return RewrittenBlocks(blocks=kept, dropped=dropped)


async def _rewrite(trace: Trace, lines: Lines, block: Block, annotator: Annotator) -> RewrittenBlock:
    bodies = bodies_of(block, lines)
    known = f"{trace.question}\n{before(block, lines)}"

    def check(reply: RewriteReply) -> Rejected | None:
        try:
            apply_edits(bodies, reply.edits, known, annotator.options)
        except Rejected as problem:
            return problem
        return None

    reply, problem = await annotator.ask(
        "rewrite",
        RewriteReply,
        check,
        key=trace.id,
        question=trace.question,
        bodies=bodies,
        after=after(block, lines) + trace.answer,
    )
    if problem is not None:
        raise problem
    if not reply.after_ok:
        raise Rejected(Reason.JOIN_DEPENDENT, reply.after_why or "no reason given")
    edited = apply_edits(bodies, reply.edits, known, annotator.options)
    return RewrittenBlock(**block.model_dump(), bodies=edited, edits=reply.edits)


def apply_edits(bodies: Sequence[str], edits: Sequence[Edit], known: str, options: StageOptions) -> list[str]:
    """The threads after their edits.

    Args:
        bodies: The threads.
        edits: Exact replacements, each found exactly once in its thread, none overlapping another.
        known: The question and the text before the block; with the thread itself, all that an edit may take numbers
            from.
        options: `max_edit_chars`, `max_edit_growth`.

    Raises:
        Rejected: An edit that cannot be applied or does more than remove a reference.
    """
    changes: list[list[tuple[int, int, str]]] = [[] for _ in bodies]
    for edit in edits:
        if not 1 <= edit.thread <= len(bodies):
            raise Rejected(Reason.EDIT_THREAD, f"thread {edit.thread} of {len(bodies)}")
        body = bodies[edit.thread - 1]
        at = body.find(edit.find) if edit.find else -1
        if at < 0:
            raise Rejected(Reason.EDIT_NOT_FOUND, f"thread {edit.thread} does not hold {edit.find[:60]!r}")
        if body.find(edit.find, at + 1) >= 0:
            raise Rejected(Reason.EDIT_AMBIGUOUS, f"thread {edit.thread} holds {edit.find[:60]!r} more than once")
        removed, added = changed_part(edit)
        growth = len(added) - len(removed)
        if max(len(removed), len(added)) > options.max_edit_chars or growth > options.max_edit_growth:
            bounds = f"max_edit_chars={options.max_edit_chars}, max_edit_growth={options.max_edit_growth}"
            raise Rejected(
                Reason.EDIT_SIZE, f"thread {edit.thread}: {len(removed)} -> {len(added)} characters, {bounds}"
            )
        if any(tag in edit.replace for tag in (*TAGS, "<think>", "</think>")):
            raise Rejected(Reason.EDIT_TAGS, f"thread {edit.thread}: {edit.replace[:60]!r}")
        changes[edit.thread - 1].append((at, at + len(edit.find), edit.replace))
    edited = [
        _changed(body, sorted(change), n) for n, (body, change) in enumerate(zip(bodies, changes, strict=True), 1)
    ]
    for number, body in enumerate(edited, 1):
        if not body.strip():
            raise Rejected(Reason.EDIT_EMPTIES, f"nothing is left of thread {number}")
        # Looked for in the whole thread: a single changed digit makes another number.
        fresh = all_numbers(body) - all_numbers(bodies[number - 1]) if changes[number - 1] else set()
        if fresh and (invented := fresh - all_numbers(known)):
            raise Rejected(Reason.EDIT_INVENTS, f"thread {number} would hold {sorted(invented)[0]}")
    return edited


def changed_part(edit: Edit) -> tuple[str, str]:
    """(what goes, what comes) of an edit, without what both have in common at their ends."""
    find, replace = edit.find, edit.replace
    head = 0
    while head < min(len(find), len(replace)) and find[head] == replace[head]:
        head += 1
    tail = 0
    while tail < min(len(find), len(replace)) - head and find[-1 - tail] == replace[-1 - tail]:
        tail += 1
    return find[head : len(find) - tail], replace[head : len(replace) - tail]


def edit_ratio(bodies: Sequence[str], edits: Sequence[Edit]) -> float:
    """The largest share of a thread that its edits change.

    Args:
        bodies: The threads before the edits.
        edits: Those of their block.
    """
    changed = [0] * len(bodies)
    for edit in edits:
        changed[edit.thread - 1] += max(map(len, changed_part(edit)))
    return max((count / len(body) for count, body in zip(changed, bodies, strict=True) if body), default=0.0)


def _changed(body: str, changes: Sequence[tuple[int, int, str]], number: int) -> str:
    pieces, at = [], 0
    for start, stop, text in changes:
        if start < at:
            raise Rejected(Reason.EDIT_OVERLAP, f"thread {number}: two edits change character {start}")
        pieces += [body[at:start], text]
        at = stop
    return "".join([*pieces, body[at:]])
