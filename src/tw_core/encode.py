"""Text to units, tokenised at the seams that inference has (SPEC section 2).

Training on text that was encoded in one piece teaches ids that inference never produces: there, each
injected header is encoded apart and each thread body starts in a fresh call. Here the injected pieces of a
well-formed text are replaced by the ids of the glue, everything between two of them is encoded as one
string, and the units are cut from the joined ids. Guarded by tests/core/test_encode.py.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from tw_core.check import check_format
from tw_core.errors import GrammarError
from tw_core.scanner import Span, scan, text_tags
from tw_core.tags import LABEL, OUTLINES, PARALLEL, THREAD, Ids, TagIds
from tw_core.units import Unit, extract_units


def encode_units(text: str, tokenizer: Any, prompt: str = "", *, tag_ids: TagIds | None = None) -> list[Unit]:
    """Encodes fork/join text into the units of the engine calls that would have written it.

    White space between the parts of a block becomes the canonical glue. No special token is added: a text
    that shall end with an end-of-sequence token contains it.

    Args:
        text: The response, well-formed; numbering as inference accepts it.
        tokenizer: As for `TagIds.from_tokenizer`; hashable and with a length where `tag_ids` is not given.
        prompt: Text before it, for example a rendered chat template; tags in it are text.
        tag_ids: `TagIds.from_tokenizer(tokenizer)` if at hand; it is remembered per tokenizer otherwise.
    Returns:
        Units in call order, the prompt at the head of every context.
    Raises:
        GrammarError: The text is not well-formed (all problems listed), or a tag is not one token.
    """
    report = check_format(text, numbering="any")
    if not report:
        listed = "; ".join(problem.message for problem in report.problems[:8])
        more = f"; and {len(report.problems) - 8} more" if len(report.problems) > 8 else ""
        raise GrammarError(
            f"text must be well-formed fork/join text, got {len(report.problems)} problems: {listed}{more}"
        )
    tags = tag_ids or _remembered(tokenizer, len(tokenizer))
    spans = list(scan(text_tags(text), 0, len(text)).walk())
    pieces: list[Ids | list[int]] = []
    at = 0
    for start, stop, glue in sorted(
        cut for block in spans if block.kind == PARALLEL for cut in _glue(text, block, tags)
    ):
        pieces += [_encode(tokenizer, text[at:start]), glue]
        at = stop
    pieces.append(_encode(tokenizer, text[at:]))
    head = _encode(tokenizer, prompt)
    ids = np.asarray([token for piece in (head, *pieces) for token in piece], dtype=np.int64)
    units = extract_units(ids, tags, len(head))
    expected = (len(ids) > len(head)) + sum(span.kind in (PARALLEL, THREAD) for span in spans)
    if len(units) != expected:
        raise GrammarError(
            f"the ids of text must fork into {expected} units, got {len(units)}: tag_ids cannot read an outline "
            "number from its ids; pass tag_ids built from this tokenizer"
        )
    return units


def _glue(text: str, block: Span, tags: TagIds) -> list[tuple[int, int, Ids]]:
    """The parts of a block that inference injects: (first character, one past the last, their ids)."""
    threads = block.of(THREAD)
    cuts = []
    at = block.of(OUTLINES)[-1].end
    for place, thread in enumerate(threads):
        label = LABEL.match(text, thread.body)
        assert label is not None  # check_format saw it
        cuts.append((at, label.end(), tags.thread_header(label[2], first=place == 0)))
        at = thread.end
    # The join: up to the conclusion or </Parallel>.
    after = next((child.start for child in block.children if child.start >= at), block.body_end)
    return [*cuts, (at, after, tags.join_newline)]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


@lru_cache(maxsize=8)
def _remembered(tokenizer: Any, size: int) -> TagIds:
    """TagIds of a tokenizer; `size` (its length) makes added tokens a new key."""
    return TagIds.from_tokenizer(tokenizer)
