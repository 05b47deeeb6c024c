"""Hypothesis strategies for fork/join text and ids, and two tokenizers without a download.

`simulated` is the oracle of units: it plays a random engine call by call and joins the ids as SPEC sections 2
and 4 say, so it knows the units without cutting anything.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tw_core import TAGS, Block, TagIds, Thread, Trajectory

# Ids of the tests: tags 1..10 in the order of TAGS, glue 20.., digits 30.., words from 100 on.
NEWLINE, COLON, DOT, DIGITS = 20, 21, 22, tuple(range(30, 40))
TAG_IDS = TagIds.from_mapping(
    {tag: place + 1 for place, tag in enumerate(TAGS)}, newline=NEWLINE, colon=COLON, digits=(*DIGITS, DOT)
)

# Text that only looks like ours, beside words, blanks and characters that break naive parsers.
_LOOKALIKES = ["<n>", "a<b", "<x", "</", "1:", "2.1:", "<parallel>", "<Thread", "Thread>", "é", "\x00", "  ", "\n", ":"]
plain_texts = st.lists(st.sampled_from(["sum", "so", "12", *_LOOKALIKES]), max_size=4).map(" ".join)

tag_soups = st.lists(
    st.one_of(st.sampled_from(TAGS), st.sampled_from(["1:", "\n1: x", "\n", " ", "word", "<n>", "2: y\n"])), max_size=40
).map("".join)
"""Tags and text in any order."""


def _plans(count: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(["plan", "then x<n>", "a: b", ""]), min_size=count, max_size=count)


@st.composite
def blocks(draw: st.DrawFn, depth: int = 2, conclusions: bool = True) -> Block:
    """A canonical block with threads that hold up to `depth - 1` further levels."""
    count = draw(st.integers(1, 3))
    bodies = [draw(_bodies(depth - 1, conclusions)) for _ in range(count)]
    summary = draw(st.none() | st.just("all")) if conclusions else None
    plans = draw(_plans(count))
    with _random_untouched():
        return Block.of(plans, bodies, summary)


@st.composite
def _bodies(draw: st.DrawFn, depth: int, conclusions: bool = True) -> list[str | Block]:
    body: list[str | Block] = [draw(plain_texts)]
    for _ in range(draw(st.integers(0, 2 if depth > 0 else 0))):
        body += ["\n", draw(blocks(depth, conclusions)), "\n" + draw(plain_texts)]
    return body


@st.composite
def trajectories(draw: st.DrawFn, depth: int = 3, conclusions: bool = True) -> Trajectory:
    """A canonical trajectory, nested to at most `depth` blocks (1: flat)."""
    body = draw(_bodies(depth, conclusions))
    with _random_untouched():
        # A thread's items are text and blocks, which is what a trajectory is made of.
        return Trajectory(Thread.of("1", *body).items)


@contextmanager
def _random_untouched() -> Iterator[None]:
    """A runtime type checker samples container items with `random`, which Hypothesis forbids in strategies."""
    state = random.getstate()
    yield
    random.setstate(state)


@dataclass(frozen=True)
class Simulated:
    """One played trajectory: the joined ids, the length of the prompt, and the calls as they were made."""

    ids: list[int]
    prompt_length: int
    units: list[tuple[list[int], list[int]]]
    critical_path: int
    num_blocks: int


_words = st.lists(st.sampled_from([100, 101, 102, NEWLINE, COLON, DIGITS[1]]), max_size=4)
_numbers = st.lists(st.sampled_from(["1", "2", "3", "10", "2.1"]), min_size=1, max_size=3)


def _label(number: str) -> list[int]:
    spelled = dict(zip("0123456789.", (*DIGITS, DOT), strict=True))
    return [NEWLINE, *(spelled[c] for c in number), COLON]


@st.composite
def simulated(draw: st.DrawFn, depth: int = 2, unfinished: bool = False) -> Simulated:
    """Plays a random engine; tags, numbers (also duplicates), words and nesting are drawn."""
    ids_of = dict(zip(TAGS, range(1, 11), strict=True))
    units: list[tuple[list[int], list[int]]] = []
    blocks_seen = 0

    def play(context: list[int], level: int, closer: list[int]) -> tuple[list[int], int]:
        """One chain of calls from `context` on: (everything it saw at the end, its critical path)."""
        nonlocal blocks_seen
        seen, path = list(context), 0
        written: list[int] = []
        for _ in range(draw(st.integers(0, 2 if level else 0))):
            blocks_seen += 1
            drawn = draw(_numbers)
            written = [*written, *draw(_words), ids_of["<Parallel>"], *draw(_words), ids_of["<Outlines>"]]
            for number in drawn:
                written += [ids_of["<Outline>"], *_label(number)[1:], *draw(_words), ids_of["</Outline>"], NEWLINE]
            written.append(ids_of["</Outlines>"])
            units.append((list(seen), written))
            base = seen + written
            joined, longest = list(base), 0
            numbers = list(dict.fromkeys(drawn))
            for place, number in enumerate(numbers):
                header = [NEWLINE, ids_of["<Thread>"], *_label(number)]
                own, body = play(base + header, level - 1, [ids_of["</Thread>"]])
                tail = own[len(base) + (0 if place == 0 else 1) :]
                joined += tail
                longest = max(longest, len(_label(number)) + body - 1)  # without </Thread>
            joined.append(NEWLINE)
            path += len(written) + longest + 2 * len(numbers) + 2  # wrappers, first newline, join newline
            seen, written = joined, [ids_of["</Parallel>"]]
        written = [*written, *draw(_words), *closer]
        if written:
            units.append((list(seen), written))
        return seen + written, path + len(written)

    prompt = draw(st.lists(st.sampled_from([1, 3, 6, 7, 100, NEWLINE]), max_size=5))
    ids, path = play(prompt, depth, [])
    return Simulated(ids, len(prompt), units, path, blocks_seen)


def as_units(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[Any, Any]]:
    """Pairs of lists as pairs of arrays, for comparison with Unit."""
    return [(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)) for a, b in pairs]


class CharTokenizer:
    """One id a character (100 + code point), one a tag; the interface of transformers that tw_core needs."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text."""
        ids: list[int] = []
        while text:
            place = next((place for place, tag in enumerate(TAGS) if text.startswith(tag)), None)
            ids.append(100 + ord(text[0]) if place is None else place + 1)
            text = text[1 if place is None else len(TAGS[place]) :]
        return ids

    def decode(self, ids: Any) -> str:
        """Text of ids."""
        return "".join(TAGS[i - 1] if i <= len(TAGS) else chr(i - 100) for i in (int(i) for i in ids))

    def get_vocab(self) -> dict[str, int]:
        """The ASCII characters and the tags."""
        return {chr(code): 100 + code for code in range(128)} | {tag: place + 1 for place, tag in enumerate(TAGS)}

    def __len__(self) -> int:
        return 100 + 0x110000


def bpe_tokenizer(tags: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross seams ("1:", ":\\n", "\\n\\n"), with the tags as single tokens or not."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    corpus = ["1: plan\n2: then: so\n10: sum\n\n", "\n1: a\n2: b", "12 so:\n1:2:\n\n"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    if tags:
        tokenizer.add_tokens([AddedToken(tag, special=True) for tag in TAGS])
    return tokenizer
