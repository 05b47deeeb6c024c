"""From ranges of lines to a trajectory, and back: blocks are placed, bodies cut, the text put together.

    lines       1 2 3 | 4 5 _ | 6 7 | 8 9         _ blank
    proposal            thread  thread
    trajectory  "1 2 3" <Parallel> … <Thread>1: 4 5</Thread><Thread>2: 6 7</Thread> </Parallel> "8 9"

Threads shrink to their non-blank lines, so everything outside stays byte for byte; what vanishes are the blank lines
between two threads, where the format allows no text. `restored` undoes `assembled` where nothing was edited.
Source: SPEC section 7, stage 2. Guarded by tests/recipes/datagen/test_layout.py and the recorded cases in
tests/recipes/datagen/test_recorded.py.
"""

from collections.abc import Sequence
from itertools import pairwise

from tw_core.grammar import Block as ForkJoin
from tw_core.grammar import Trajectory, parse
from tw_recipes.datagen.models import Block, LineRange, OutlinedBlock
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.reasons import Reason, Rejected


def placed(
    number: int, ranges: Sequence[LineRange], lines: Lines, options: StageOptions, why: str = ""
) -> tuple[Block, int]:
    """Turn proposed ranges into a block.

    A range written backwards is turned round, one that runs past the trace ends there, a thread beyond it is left out;
    each is counted. Blank threads are left out.

    Args:
        number: Of the block in its proposal.
        ranges: One a thread.
        lines: The trace.
        options: `max_threads`, `min_saving`.
        why: The annotator's reason.

    Returns:
        (the block, its threads in order and without blank edges; ranges that were put right).

    Raises:
        Rejected: The ranges make no block; the reason says why.
    """
    spans, repairs, absent = [], 0, 0
    for thread in ranges:
        first, last = sorted((thread.first_line, thread.last_line))
        inside = max(first, 1), min(last, len(lines))
        repairs += (thread.first_line, thread.last_line) != inside
        if inside[0] > inside[1]:
            absent += 1
        elif not lines.blank(*inside):
            spans.append(lines.trimmed(*inside))
    if len(spans) < 2:
        reason = Reason.BLOCK_RANGE if absent else Reason.BLOCK_FEW_THREADS
        detail = f"{absent} beyond its {len(lines)} lines"
        raise Rejected(reason, f"{len(spans)} of {len(ranges)} threads hold text of the trace, {detail}")
    if len(spans) > options.max_threads:
        raise Rejected(Reason.BLOCK_MANY_THREADS, f"{len(spans)} threads, max_threads={options.max_threads}")
    spans.sort()
    for (_, last), (first, _) in pairwise(spans):
        if first <= last:
            raise Rejected(Reason.BLOCK_OVERLAP, f"threads share L{first}")
        if not lines.blank(last + 1, first - 1):
            raise Rejected(Reason.BLOCK_GAP, f"text between the threads at L{last + 1}-L{first - 1}")
    block = Block(number=number, threads=[LineRange(first_line=a, last_line=b) for a, b in spans], why=why)
    saved = saving([len(body) for body in bodies_of(block, lines)])
    if saved < options.min_saving:
        raise Rejected(Reason.BLOCK_SAVING, f"{saved} characters saved, min_saving={options.min_saving}")
    return block, repairs


def disjoint(blocks: Sequence[Block]) -> tuple[list[Block], list[Block]]:
    """(blocks in order that share no line, those that share one with a block before them)."""
    kept: list[Block] = []
    overlapping: list[Block] = []
    for block in sorted(blocks, key=lambda b: (b.threads[0].first_line, b.number)):
        clear = not kept or kept[-1].threads[-1].last_line < block.threads[0].first_line
        (kept if clear else overlapping).append(block)
    return kept, overlapping


def saving(lengths: Sequence[int]) -> int:
    """What running threads at once saves: their sum less the longest."""
    return sum(lengths) - max(lengths, default=0)


def bodies_of(block: Block, lines: Lines) -> list[str]:
    """The text of each thread, without its last line feed (the format brings one)."""
    return [lines.text(t.first_line, t.last_line).removesuffix("\n") for t in block.threads]


def outside(blocks: Sequence[Block], lines: Lines) -> list[str]:
    """The text before, between and after the blocks: one more than there are blocks."""
    at, texts = 1, []
    for block in blocks:
        texts.append(lines.text(at, block.threads[0].first_line - 1))
        at = block.threads[-1].last_line + 1
    return [*texts, lines.text(at, len(lines))]


def before(block: Block, lines: Lines) -> str:
    """The text up to the block."""
    return lines.text(1, block.threads[0].first_line - 1)


def after(block: Block, lines: Lines) -> str:
    """The text from the block on."""
    return lines.text(block.threads[-1].last_line + 1, len(lines))


def assembled(blocks: Sequence[OutlinedBlock], lines: Lines) -> Trajectory:
    """The reasoning as fork/join text.

    Args:
        blocks: In order, disjoint, with bodies and outlines.
        lines: The trace.
    """
    texts = outside(blocks, lines)
    items: list[str | ForkJoin] = []
    for place, block in enumerate(blocks):
        ended = lines.lines[block.threads[-1].last_line - 1].endswith("\n")
        items += [texts[place], ForkJoin.of(block.outlines, block.bodies), "\n" if ended else ""]
    merged: list[str | ForkJoin] = []
    for item in [*items, texts[-1]]:
        if isinstance(item, str) and merged and isinstance(merged[-1], str):
            merged[-1] += item
        elif item != "":
            merged.append(item)
    return Trajectory(tuple(merged))


def restored(text: str) -> str:
    """Fork/join text without its structure: the threads' bodies one after another, a line feed after each."""
    pieces = []
    for item in parse(text).items:
        if isinstance(item, ForkJoin):
            # One blank after "{number}:" and the line feed before </Thread> belong to the format.
            bodies = [thread.body.removeprefix(" ").removesuffix("\n") for thread in item.threads]
            pieces.append("\n".join(bodies))
        else:
            pieces.append(item)
    return "".join(pieces)


def response(reasoning: str, answer: str) -> str:
    """The response in chat form: reasoning in think tags, then the answer."""
    ended = "" if reasoning.endswith("\n") else "\n"
    return f"<think>\n{reasoning}{ended}</think>\n\n{answer}"
