"""The tag set, and how a tokenizer writes it: `TagIds`.

SPEC section 1: each tag is ONE token. SPEC section 2: text between tags is encoded at the seams that
inference has, so the injected glue has fixed ids. The decision, made here once:

    first header    encode("\\n"), <Thread>, encode("\\n{n}:")       after </Outlines>
    later headers                 <Thread>, encode("\\n{n}:")       directly after </Thread>
    join            encode("\\n")                                   after the last </Thread>
    forced closes   encode("\\n"), </Thread>   and   encode("\\n"), </Parallel>

"\\n{n}:" is encoded as one string; what follows the colon is the model's and is encoded apart.
Guarded by tests/core/test_tags.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tw_core.errors import GrammarError

TAGS: tuple[str, ...] = (
    "<Parallel>",
    "</Parallel>",
    "<Outlines>",
    "</Outlines>",
    "<Outline>",
    "</Outline>",
    "<Thread>",
    "</Thread>",
    "<Conclusion>",
    "</Conclusion>",
)
"""Every tag of the format; openers at even, closers at odd places. The last pair is optional."""

# Places in TAGS, used as piece kinds by the scanner.
PARALLEL, OUTLINES, OUTLINE, THREAD, CONCLUSION = 0, 2, 4, 6, 8

NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)*")
"""What may stand before the colon of an outline or a thread (SPEC section 1, inference)."""

LABEL = re.compile(r"(\s*)([0-9]+(?:\.[0-9]+)*)(\s*:)")
"""`{number}:` at the head of an outline or a thread, blanks allowed around the number."""

LABEL_IDS = 32
"""A label longer than this many ids is not a number any more."""

# A vocabulary entry that can take part in a label, in the raw spelling of the usual tokenizers:
# byte-level BPE writes "Ċ" and "Ġ" for newline and space, sentencepiece "▁" and "<0x0A>".
_LABEL_TOKEN = re.compile(r"(?:[\sĊĠ▁]|<0x0[AD]>)*[0-9.]*(?:[\sĊĠ▁])*(?::.*)?", re.DOTALL)

Ids = tuple[int, ...]


@dataclass(frozen=True)
class TagIds:
    """The id of each tag and the ids of the glue that inference injects.

    Built by `from_tokenizer` (everything known) or `from_mapping` (glue optional: a method that needs a
    missing piece raises and names it). Hashable, picklable, compared by value.

    Attributes:
        parallel_open, ...: One id per tag, in the order of `TAGS`. The conclusion pair may be None.
        newline: Ids of "\\n", or None where unknown.
        colon: Ids of ":", or None where unknown.
        digits: Ids of numbers or single characters ("0".."9", "."), or None where unknown.
    """

    parallel_open: int
    parallel_close: int
    outlines_open: int
    outlines_close: int
    outline_open: int
    outline_close: int
    thread_open: int
    thread_close: int
    conclusion_open: int | None = None
    conclusion_close: int | None = None
    newline: Ids | None = None
    colon: Ids | None = None
    digits: tuple[tuple[str, Ids], ...] | None = None
    _encode: Callable[[str], Ids] | None = field(default=None, compare=False, repr=False)
    _texts: Mapping[int, str] = field(default_factory=dict, compare=False, repr=False)
    _labels: dict[str, Ids] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        owner: dict[int, str] = {}
        for tag, tag_id in zip(TAGS, self.ids, strict=True):
            if tag_id is None:
                if tag not in TAGS[CONCLUSION:]:
                    raise GrammarError(f"the id of {tag} is missing; only the <Conclusion> pair may be None")
                continue
            if isinstance(tag_id, bool) or not isinstance(tag_id, int | np.integer) or tag_id < 0:
                raise GrammarError(f"the id of {tag} must be a non-negative integer, got {tag_id!r}; pass a token id")
            if tag_id in owner:
                raise GrammarError(
                    f"{owner[int(tag_id)]} and {tag} share the id {tag_id}; give every tag its own token"
                )
            owner[int(tag_id)] = tag
        if (self.conclusion_open is None) != (self.conclusion_close is None):
            raise GrammarError(
                "<Conclusion> and </Conclusion> must both have an id or both be None; add the missing one"
            )

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, int],
        newline: int | Sequence[int] | None = None,
        colon: int | Sequence[int] | None = None,
        digits: Sequence[int] | Mapping[str, int | Sequence[int]] | None = None,
    ) -> "TagIds":
        """Builds from plain ids, without a tokenizer.

        Args:
            mapping: Tag -> id for the tags of `TAGS`; the conclusion pair may be left out, other keys are
                refused.
            newline: Id or ids of "\\n". Needed to place a header or a join.
            colon: Id or ids of ":". Needed to find where a header ends.
            digits: Ids of "0".."9" in order (an eleventh is "."), or a mapping from numbers or single
                characters to their id or ids. Needed only to write headers for numbers that the ids do
                not already hold (`thread_header`): `extract_units` copies numbers it meets.
        Raises:
            GrammarError: A tag is missing or unknown, two tags share an id, or an id is not one.
        """
        unknown = sorted(set(mapping) - set(TAGS))
        missing = [tag for tag in TAGS[:CONCLUSION] if tag not in mapping]
        if unknown or missing:
            raise GrammarError(
                f"mapping must give an id to each of {', '.join(TAGS[:CONCLUSION])} (and may to {TAGS[8]} and "
                f"{TAGS[9]}); missing: {missing or 'none'}, unknown: {unknown or 'none'}; fix the keys of the mapping"
            )
        ids = [mapping.get(tag) for tag in TAGS]
        named = None if digits is None else _named_digits(digits)
        texts: dict[int, str] = {}
        pieces = [("\n", _glue(newline, "newline")), (":", _glue(colon, "colon")), *(named or ())]
        for text, piece in pieces:
            if piece is not None and len(piece) == 1 and named is not None:
                texts[piece[0]] = text
        return cls(**_fields(ids), newline=pieces[0][1], colon=pieces[1][1], digits=named, _texts=texts)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TagIds":
        """Reads the tags and the glue from a tokenizer with the transformers interface.

        Args:
            tokenizer: Anything with `encode(text, add_special_tokens=False)`, `decode(ids)`, `get_vocab()`.
                It is kept, to encode headers as they are met.
        Raises:
            GrammarError: A tag is not one token; the message shows the pieces. The conclusion pair is
                optional and becomes None when either of the two is not one token. Or "1:" cannot be
                written in ids that read back as 1.
        """
        encode = _Encoder(tokenizer)
        ids = [_single_token(tokenizer, encode, tag, optional=tag in TAGS[CONCLUSION:]) for tag in TAGS]
        if ids[8] is None or ids[9] is None:
            ids[8] = ids[9] = None
        texts = _label_texts(tokenizer)
        tags = cls(**_fields(ids), newline=encode("\n"), colon=encode(":"), _encode=encode, _texts=texts)
        tags.label("1")
        return tags

    @property
    def ids(self) -> tuple[int | None, ...]:
        """The ten tag ids in the order of `TAGS`; None for an absent conclusion pair."""
        return (
            *(self.parallel_open, self.parallel_close, self.outlines_open, self.outlines_close),
            *(self.outline_open, self.outline_close, self.thread_open, self.thread_close),
            *(self.conclusion_open, self.conclusion_close),
        )

    @property
    def join_newline(self) -> Ids:
        """Ids of the "\\n" injected after the last </Thread> of a block."""
        return self._need(self.newline, "newline")

    @property
    def forced_thread_close(self) -> Ids:
        """Ids of "\\n</Thread>", appended to a thread that ended without its closer (no loss on them)."""
        return (*self.join_newline, self.thread_close)

    @property
    def forced_block_close(self) -> Ids:
        """Ids of "\\n</Parallel>", appended when the budget is gone inside a block (no loss on them)."""
        return (*self.join_newline, self.parallel_close)

    def thread_header(self, number: str, first: bool) -> Ids:
        """Ids of the injected header of thread `number`.

        Args:
            number: As the outline writes it, e.g. "1" or "2.1".
            first: With the leading "\\n": the first thread of a block in the joined ids, and EVERY thread in
                the context of its own call (SPEC section 2).
        """
        return (*(self.join_newline if first else ()), self.thread_open, *self.label(number))

    def label(self, number: str) -> Ids:
        """Ids of "\\n{number}:", the part of a header after <Thread>."""
        if number not in self._labels:
            if not NUMBER.fullmatch(number):
                raise GrammarError(f"number must match [0-9]+(.[0-9]+)*, got {number!r}; use the outline's own number")
            self._labels[number] = self._encoded(number) if self._encode else self._compose(number)
        return self._labels[number]

    def read_number(self, ids: Sequence[int]) -> str | None:
        """The number before the colon at the head of an outline or thread, None if there is none.

        Args:
            ids: The ids after the opening tag; a few dozen are enough.
        Raises:
            GrammarError: Colon or digits are unknown (from_mapping without them).
        """
        self._need(self.colon, "colon")
        if self.digits is None and self._encode is None:
            raise self._missing("digits")
        if self._texts:
            text = ""
            for token in ids[:LABEL_IDS]:
                if (piece := self._texts.get(int(token))) is None:
                    break
                text += piece
                if ":" in piece:
                    break
            if match := LABEL.match(text):
                return match[2]
        opaque = self._opaque(ids)
        return next((name for name, known in self.digits or () if known == opaque and NUMBER.fullmatch(name)), None)

    def read_label(self, ids: Sequence[int]) -> Ids | None:
        """The "\\n{n}:" that inference injects for the outline whose content starts with `ids`.

        Unlike `read_number` this works without knowing the digits: the ids before the first colon are
        copied. None when the outline has no number.
        """
        if self.digits is not None or self._encode is not None:
            number = self.read_number(ids)
            return None if number is None else self.label(number)
        opaque = self._opaque(ids)
        return (*self.join_newline, *opaque, *self._need(self.colon, "colon")) if opaque else None

    def is_blank(self, token: int) -> bool:
        """Whether a token is known to be white space alone."""
        return token in (self.newline or ()) or self._texts.get(token, "x").isspace()

    def _opaque(self, ids: Sequence[int]) -> Ids:
        """The ids before the first colon, a leading newline dropped; empty if there is no colon nearby."""
        colon, newline = self._need(self.colon, "colon"), self.newline or ()
        head = tuple(int(token) for token in ids[:LABEL_IDS])
        if newline and head[: len(newline)] == newline:
            head = head[len(newline) :]
        ends = (at for at in range(len(head)) if head[at : at + len(colon)] == colon)
        return head[: next(ends, 0)]

    def _encoded(self, number: str) -> Ids:
        assert self._encode is not None
        ids = self._encode(f"\n{number}:")
        if self.read_number(ids) != number:
            pieces = [self._texts.get(token, f"id {token}") for token in ids]
            raise GrammarError(
                f"the tokenizer must write {f'{chr(10)}{number}:'!r} in ids that read back as {number}, got {pieces}; "
                'add the digits, "." and ":" to its vocabulary'
            )
        return ids

    def _compose(self, number: str) -> Ids:
        newline, colon = self._need(self.newline, "newline"), self._need(self.colon, "colon")
        if self.digits is None:
            raise self._missing("digits")
        known = dict(self.digits)
        parts = [number] if number in known else list(number)
        unknown = [part for part in parts if part not in known]
        if unknown:
            raise GrammarError(
                f"digits must hold {number!r} or each of its characters, lacks {unknown}; "
                f"add them to from_mapping(digits=...)"
            )
        return (*newline, *(token for part in parts for token in known[part]), *colon)

    def _need(self, piece: Ids | None, name: str) -> Ids:
        if piece is None:
            raise self._missing(name)
        return piece

    @staticmethod
    def _missing(name: str) -> GrammarError:
        return GrammarError(
            f"TagIds has no {name}, which this call needs to place the injected glue; "
            f"pass {name}=... to TagIds.from_mapping or use TagIds.from_tokenizer"
        )


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer reduced to text -> ids without special tokens added (a class, so that TagIds pickles)."""

    tokenizer: Any

    def __call__(self, text: str) -> Ids:
        return tuple(int(token) for token in self.tokenizer.encode(text, add_special_tokens=False))


def _fields(ids: Sequence[int | None]) -> dict[str, Any]:
    """Ids in the order of TAGS -> the attribute names of TagIds."""
    names = (f"{tag.strip('</>').lower()}_{'close' if '/' in tag else 'open'}" for tag in TAGS)
    return dict(zip(names, ids, strict=True))


def _single_token(tokenizer: Any, encode: _Encoder, tag: str, optional: bool) -> int | None:
    ids = encode(tag)
    if len(ids) == 1 and tokenizer.decode(list(ids)).strip() == tag:
        return ids[0]
    if optional:
        return None
    pieces = [tokenizer.decode([token]) for token in ids]
    raise GrammarError(
        f"{tag} must be one token of the tokenizer, got {len(ids)} {pieces}; "
        f"add the tags first: tw_recipes.sft.add_tag_tokens(model, tokenizer)"
    )


def _label_texts(tokenizer: Any) -> dict[int, str]:
    """Id -> text of every token that can be part of "{number}:", to read outline numbers off ids."""
    tags = set(TAGS)
    candidates = [
        token for raw, token in tokenizer.get_vocab().items() if raw not in tags and _LABEL_TOKEN.fullmatch(raw)
    ]
    return {int(token): tokenizer.decode([token]) for token in candidates}


def _glue(value: int | Sequence[int] | None, name: str) -> Ids | None:
    if value is None:
        return None
    ids = (value,) if isinstance(value, int | np.integer) else tuple(value)
    if not ids or any(isinstance(token, bool) or not isinstance(token, int | np.integer) or token < 0 for token in ids):
        raise GrammarError(f"{name} must be a token id or a non-empty sequence of them, got {value!r}; encode it")
    return tuple(int(token) for token in ids)


def _named_digits(digits: Sequence[int] | Mapping[str, int | Sequence[int]]) -> tuple[tuple[str, Ids], ...]:
    if not isinstance(digits, Mapping):
        if len(digits) not in (10, 11):
            raise GrammarError(
                f'digits must list the ids of "0".."9" (and "."), got {len(digits)} ids; or pass a mapping'
            )
        digits = dict(zip("0123456789.", digits, strict=False))
    named = []
    for name, value in digits.items():
        ids = _glue(value, f"digits[{name!r}]")
        assert ids is not None
        named.append((name, ids))
    return tuple(named)
