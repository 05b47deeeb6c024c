"""What goes into and comes out of each stage, and what the annotator answers: pydantic models.

    Trace ─steps─► Steps ─blocks─► Blocks ─rewrite─► Rewritten ─outlines─► Outlined ─filter─► Sample

Stage outputs are also the lines of the stage files. The `*Reply` models are the JSON schemas that the annotator is
given; they have no defaults, since strict structured output wants every field. Lines are 1-based and inclusive.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from tw_recipes.datagen.reasons import Reason


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Trace(_Model):
    """A correct sequential trace.

    Attributes:
        place: 0-based place in the input; the key of everything.
        id: Its name, for reading.
        question: The problem.
        reasoning: The text of `<think>`.
        answer: The text after it, with the boxed answer.
        truth: The reference answer.
    """

    place: int
    id: str
    question: str
    reasoning: str
    answer: str
    truth: str


class LineRange(_Model):
    """Lines first_line to last_line, both included."""

    first_line: int
    last_line: int


class SubStep(LineRange):
    """A part of a step."""

    title: str


class Step(SubStep):
    """A main step; its sub-steps cover its lines without gaps, or there are none."""

    substeps: list[SubStep]


class Steps(_Model):
    """Output of stage 1: steps that cover every line once, in order."""

    steps: list[Step]


class Dropped(_Model):
    """A reason, with where it was found.

    Attributes:
        reason: The code.
        detail: One line.
        block: Number of the proposed block, from 1; None for the whole record.
    """

    reason: Reason
    detail: str
    block: int | None = None


class Block(_Model):
    """Threads of a block: disjoint, in order, nothing but blank lines between them.

    Attributes:
        number: The block's number in the proposal.
        threads: Their lines.
        why: The annotator's reason.
    """

    number: int
    threads: list[LineRange]
    why: str = ""


class Blocks(_Model):
    """Output of stage 2: blocks that passed every check, and those that did not.

    Attributes:
        blocks: In order of the trace, disjoint.
        dropped: The others, with their reasons.
        repairs: How many ranges were reversed or ran past the trace, and were put right.
    """

    blocks: list[Block]
    dropped: list[Dropped] = []
    repairs: int = 0


class Edit(_Model):
    """Replace `find`, which the thread holds exactly once, by `replace`."""

    thread: int
    find: str
    replace: str


class RewrittenBlock(Block):
    """A block whose threads stand on their own.

    Attributes:
        bodies: Text of each thread after the edits.
        edits: What was changed.
    """

    bodies: list[str]
    edits: list[Edit] = []


class Rewritten(_Model):
    """Output of stage 3."""

    blocks: list[RewrittenBlock]
    dropped: list[Dropped] = []


class OutlinedBlock(RewrittenBlock):
    """A block with the plan of each thread."""

    outlines: list[str]


class Outlined(_Model):
    """Output of stage 4."""

    blocks: list[OutlinedBlock]
    dropped: list[Dropped] = []


Kind = Literal["forkjoin", "sequential", "rejected", "failed"]


class Sample(_Model):
    """Output of stage 5: the record's end.

    Attributes:
        place: As in `Trace`.
        id: As in `Trace`.
        kind: "forkjoin"; "sequential": a good trace without a block; "rejected"; "failed": to be tried again.
        prompt: The question; empty if there is no text.
        text: Fork/join text of the response; empty for "rejected" and "failed".
        sequential: The response as it came in, for the sequential share of the mix; empty likewise.
        answer: The reference answer.
        acceleration: 1 - critical path / length, in characters.
        edit_ratio: Largest changed share of a thread.
        threads: Number of threads of each block.
        dropped: Everything that was left out on the way, with reasons.
        repairs: Proposed ranges that were put right.
    """

    place: int
    id: str
    kind: Kind
    prompt: str = ""
    text: str = ""
    sequential: str = ""
    answer: str = ""
    acceleration: float = 0.0
    edit_ratio: float = 0.0
    threads: list[int] = []
    dropped: list[Dropped] = []
    repairs: int = 0


class StepsReply(_Model):
    """The annotator's steps."""

    steps: list[Step]


class ProposedBlock(_Model):
    """Threads that the annotator would run at once."""

    why: str
    threads: list[LineRange]


class BlocksReply(_Model):
    """The annotator's blocks; none if nothing is independent."""

    blocks: list[ProposedBlock]


class ThreadVerdict(_Model):
    """Self-check of one thread.

    Attributes:
        thread: Its number, from 1.
        uses_threads: Numbers of the threads it needs something from.
        complete: Whether it is a whole piece of work, from its start to its result.
        why: In a few words.
    """

    thread: int
    uses_threads: list[int]
    complete: bool
    why: str


class CheckReply(_Model):
    """Self-check of a block."""

    verdicts: list[ThreadVerdict]


class RewriteReply(_Model):
    """Edits that make threads stand on their own.

    Attributes:
        edits: None where nothing refers to another thread.
        after_ok: Whether the text after the block still makes sense.
        after_why: Why not.
    """

    edits: list[Edit]
    after_ok: bool
    after_why: str


class PlannedThread(_Model):
    """The plan of one thread."""

    thread: int
    outline: str


class OutlinesReply(_Model):
    """The plans of a block."""

    outlines: list[PlannedThread]
