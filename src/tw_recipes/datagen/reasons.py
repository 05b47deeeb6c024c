"""Why a record, a block or a call was left out: one code a cause, stable, for counting.

`Reason` is what the report counts and what stage files hold; `EXPLAINED` says each in words. A block that is dropped
becomes plain text again, exactly as it was; a record that is rejected leaves the data set; a record that failed (the
endpoint, not the text) is tried again by the next run.
Guarded by tests/recipes/datagen/test_adversarial.py, which gives every code a cause.
"""

from enum import StrEnum

from tw_core.errors import ThreadWeaverError


class Reason(StrEnum):
    """Codes, by the stage that gives them."""

    INPUT_ROW = "input_row"
    INPUT_TAGS = "input_tags"
    INPUT_SHORT = "input_short"
    INPUT_LONG = "input_long"
    INPUT_WRONG = "input_wrong"

    REPLY_EMPTY = "reply_empty"
    REPLY_REFUSAL = "reply_refusal"
    REPLY_TRUNCATED = "reply_truncated"
    REPLY_NOT_JSON = "reply_not_json"
    REPLY_SCHEMA = "reply_schema"

    STEPS_RANGE = "steps_range"
    STEPS_GAP = "steps_gap"
    STEPS_OVERLAP = "steps_overlap"

    NO_BLOCKS = "no_blocks"
    BLOCK_RANGE = "block_range"
    BLOCK_FEW_THREADS = "block_few_threads"
    BLOCK_MANY_THREADS = "block_many_threads"
    BLOCK_GAP = "block_gap"
    BLOCK_OVERLAP = "block_overlap"
    BLOCK_OFF_STEP = "block_off_step"
    BLOCK_SAVING = "block_saving"
    CHECK_MISMATCH = "check_mismatch"
    CHECK_DEPENDENT = "check_dependent"
    CHECK_INCOMPLETE = "check_incomplete"

    EDIT_THREAD = "edit_thread"
    EDIT_NOT_FOUND = "edit_not_found"
    EDIT_AMBIGUOUS = "edit_ambiguous"
    EDIT_OVERLAP = "edit_overlap"
    EDIT_SIZE = "edit_size"
    EDIT_TAGS = "edit_tags"
    EDIT_INVENTS = "edit_invents"
    EDIT_EMPTIES = "edit_empties"
    JOIN_DEPENDENT = "join_dependent"

    OUTLINE_COUNT = "outline_count"
    OUTLINE_FORM = "outline_form"
    OUTLINE_LEAK = "outline_leak"
    OUTLINE_INVENTS = "outline_invents"

    FORMAT = "format"
    TEXT_CHANGED = "text_changed"
    ANSWER_CHANGED = "answer_changed"
    SIBLING_NUMBERS = "sibling_numbers"
    SIBLING_WORDS = "sibling_words"
    EDIT_RATIO = "edit_ratio"
    SMALL_GAIN = "small_gain"

    ENDPOINT = "endpoint"
    INTERNAL = "internal"


EXPLAINED: dict[Reason, str] = {
    Reason.INPUT_ROW: "the input row lacks a column, or a value is no text",
    Reason.INPUT_TAGS: "the trace holds fork/join or think tags already",
    Reason.INPUT_SHORT: "the trace has too few lines for a block",
    Reason.INPUT_LONG: "the trace is longer than max_trace_chars",
    Reason.INPUT_WRONG: "the trace's own answer is wrong or cannot be graded",
    Reason.REPLY_EMPTY: "the annotator said nothing",
    Reason.REPLY_REFUSAL: "the annotator refused",
    Reason.REPLY_TRUNCATED: "the reply ran out of tokens",
    Reason.REPLY_NOT_JSON: "the reply is no JSON",
    Reason.REPLY_SCHEMA: "the reply is JSON of another shape",
    Reason.STEPS_RANGE: "a step names lines that are not there, or ends before it begins",
    Reason.STEPS_GAP: "steps leave lines out",
    Reason.STEPS_OVERLAP: "steps share lines",
    Reason.NO_BLOCKS: "the annotator sees nothing that can run side by side",
    Reason.BLOCK_RANGE: "threads lie beyond the trace, and fewer than two are left",
    Reason.BLOCK_FEW_THREADS: "a block has fewer than two threads that are not blank",
    Reason.BLOCK_MANY_THREADS: "a block has more than max_threads threads",
    Reason.BLOCK_GAP: "text stands between two threads of a block",
    Reason.BLOCK_OVERLAP: "threads or blocks share lines",
    Reason.BLOCK_OFF_STEP: "a thread cuts a step in two",
    Reason.BLOCK_SAVING: "running the threads at once saves less than min_saving",
    Reason.CHECK_MISMATCH: "the self-check does not speak of each thread once",
    Reason.CHECK_DEPENDENT: "the self-check says a thread needs another one",
    Reason.CHECK_INCOMPLETE: "the self-check says a thread is a fragment",
    Reason.EDIT_THREAD: "an edit names a thread that is not there",
    Reason.EDIT_NOT_FOUND: "an edit looks for text that the thread does not hold",
    Reason.EDIT_AMBIGUOUS: "an edit looks for text that the thread holds more than once",
    Reason.EDIT_OVERLAP: "two edits change the same characters",
    Reason.EDIT_SIZE: "an edit changes more than max_edit_chars characters, or adds more than max_edit_growth",
    Reason.EDIT_TAGS: "an edit writes a tag",
    Reason.EDIT_INVENTS: "an edit writes a number that neither the thread nor the text before the block holds",
    Reason.EDIT_EMPTIES: "the edits leave nothing of a thread",
    Reason.JOIN_DEPENDENT: "the text after the block would no longer make sense",
    Reason.OUTLINE_COUNT: "there is not one outline a thread",
    Reason.OUTLINE_FORM: "an outline is empty, too long, has several lines or a tag",
    Reason.OUTLINE_LEAK: "an outline holds a result of a thread, or its wording",
    Reason.OUTLINE_INVENTS: "an outline holds a number that stands nowhere before the block",
    Reason.FORMAT: "the trajectory is not well-formed",
    Reason.TEXT_CHANGED: "text outside of blocks, or of a thread beyond its edits, is not that of the trace",
    Reason.ANSWER_CHANGED: "the trajectory's answer is no longer right",
    Reason.SIBLING_NUMBERS: "a thread works with numbers that another thread found",
    Reason.SIBLING_WORDS: "a thread repeats another thread",
    Reason.EDIT_RATIO: "edits change more than max_edit_ratio of a thread",
    Reason.SMALL_GAIN: "the critical path shrinks by less than min_acceleration",
    Reason.ENDPOINT: "the endpoint gave no reply, after all retries",
    Reason.INTERNAL: "the generator itself failed",
}

FAILURES = frozenset({Reason.ENDPOINT, Reason.INTERNAL})
"""Reasons that say nothing about the record: the next run tries it again."""


class DatagenError(ThreadWeaverError):
    """Data generation cannot go on."""


class Rejected(DatagenError):
    """A record is left out, or a block becomes plain text again.

    Attributes:
        reason: The code.
        detail: What was found where, in one line.
    """

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail[:300]
