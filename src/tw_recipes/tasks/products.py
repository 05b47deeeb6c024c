r"""The sum of products: a word problem whose answer needs four independent products and then their sum.

    prompt       1w41x2 boxes of 1y91z9 eggs, 2w72x7 boxes of 2y52z4 keys, …: how many?
    work         1: 1w41x2*1y91z9          one product: 24 times 99, each digit after a label (product, place)
                 4*9=6300>6300             a digit product a line: shifted to its place > running total
                 4*9=0630>6930
                 2*9=0810>6750
                 2*9=0081>6732
                 =1a61b71c31d2             the result, labelled likewise
    sum          1a6602a5113a7814a4225a2   a column addition, a line a place: label, copied digit, running sum;
                 …                         at the end the sum's own digit, with a label
                 5a25b95c45d61             the digits of the sum, read off the columns by their labels
    answer       \boxed{29461}             16492

Digits are written from the lowest place up, so that carries run with the text; the answer too. The sequential and the
fork/join solution have the same lines in the same order; fork/join adds the tags and the outlines. Every text of one
style has the same number of tokens.

Each label (1w, 1a, …) is one token and makes copying what follows it a look-up: without labels a tiny model learns the
products and then fails to copy, factors as well as results.

Tests: tests/recipes/tasks/test_products.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tw_recipes.evaluation.grading import ExactGrader
from tw_recipes.tasks.splits import Search, Split, Style, check_rows, is_test, stream
from tw_recipes.tasks.text import Piece, digits, fork, strings
from tw_recipes.tasks.tokenizer import build_tokenizer

NOUNS = ("pens", "cups", "nuts", "maps", "hats", "keys", "eggs", "jars")
_PLACES = "abcd"
_SUM = 5  # the "term" of the sum in labels


@dataclass(frozen=True)
class SumOfProducts:
    """The task; every method is deterministic in its arguments.

    Attributes:
        terms: Products a problem has, 2 to 4.
    """

    terms: int = 4
    name: str = "products"

    def __post_init__(self) -> None:
        if self.terms not in (2, 3, 4):
            raise ValueError(f"terms must be 2, 3 or 4, got {self.terms}")

    def problems(self, count: int, *, seed: int, split: Split = "train") -> np.ndarray:
        """Distinct problems of one split; a problem belongs to one split whatever the seed.

        Args:
            count: How many.
            seed: Of the generator; the splits draw from different streams.
            split: "train" or "test".

        Returns:
            Factors of the products. Shape (count, terms, 2), int64, 0..99.

        Raises:
            ValueError: `count` or `split` is not possible.
        """
        rng = stream(count, seed=seed, split=split, salt=self.terms)
        weights = 100 ** np.arange(2 * self.terms, dtype=np.uint64)
        keys = np.empty(0, dtype=np.uint64)
        search = Search(count)
        while search.wants_more(len(keys)):
            drawn = (rng.integers(0, 100, (2 * count + 64, 2 * self.terms)).astype(np.uint64) * weights).sum(axis=1)
            keys = np.concatenate([keys, drawn[is_test(drawn) == (split == "test")]])
            keys = keys[np.sort(np.unique(keys, return_index=True)[1])]
        factors = keys[:count, None] // weights % np.uint64(100)
        return factors.astype(np.int64).reshape(count, self.terms, 2)

    def rows(
        self,
        count: int,
        *,
        seed: int,
        split: Split = "train",
        style: Style = "forkjoin",
        offset: int = 0,
        plain: bool = False,
    ) -> list[dict[str, str]]:
        """Data set rows: the problems with one style of solution.

        Args:
            count: How many.
            seed: As in `problems`.
            split: As in `problems`.
            style: "sequential" or "forkjoin"; the problems and their answers do not depend on it.
            offset: Leave out that many problems at the head of the stream.
            plain: Ordinary notation and words, for the tokenizer of a real model.

        Returns:
            Rows {"prompt", "text", "answer", "difficulty"}; the difficulty is the number of products.
        """
        check_rows(style, offset)
        factors = self.problems(offset + count, seed=seed, split=split)[offset:]
        nouns = np.random.default_rng(seed).integers(0, len(NOUNS), (offset + count, self.terms))[offset:]
        if plain:
            return [plain_row(*pair, style) for pair in zip(factors.tolist(), nouns.tolist(), strict=True)]
        total = factors.prod(axis=2).sum(axis=1)
        texts = strings(solution(factors, style))
        return [
            {"prompt": prompt, "text": text, "answer": answer, "difficulty": str(self.terms)}
            for prompt, text, answer in zip(
                strings(question(factors, nouns)), texts, strings([digits(total, 5)]), strict=True
            )
        ]

    def tokenizer(self) -> Any:
        """One token a digit, label, word and tag."""
        return build_tokenizer(vocabulary())

    def grader(self) -> ExactGrader:
        """Compares the boxed answer after `</think>` with the row's answer; it never sees the prompt."""
        return ExactGrader()


def vocabulary() -> list[str]:
    """Every piece of the labelled texts."""
    labels = [f"{term}{place}" for term in (1, 2, 3, 4, _SUM) for place in _PLACES]
    labels += [f"{term + 1}{factor}" for term in range(4) for factor in "wxyz"]
    words = [" boxes of ", *(f" {noun}" for noun in NOUNS), ", ", ": how many?"]
    return [*labels, *words, *"0123456789", *"*=> :.{}", "\n", "\\boxed"]


def problem_keys(factors: np.ndarray) -> np.ndarray:
    """A number for each problem, one to one. factors (n, terms, 2), 0..99 -> (n,), uint64."""
    flat = factors.reshape(len(factors), 2 * factors.shape[1]).astype(np.uint64)
    return (flat * 100 ** np.arange(flat.shape[1], dtype=np.uint64)).sum(axis=1)


def question(factors: np.ndarray, nouns: np.ndarray) -> list[Piece]:
    """The prompt. factors (n, terms, 2), nouns (n, terms)."""
    names = np.frombuffer("".join(NOUNS).encode(), np.uint8).reshape(len(NOUNS), -1)
    pieces: list[Piece] = []
    for term in range(factors.shape[1]):
        left, right = factors[:, term].T
        pieces += [", "] if term else []
        pieces += [
            *labelled_factor(left, term, "wx"),
            " boxes of ",
            *labelled_factor(right, term, "yz"),
            " ",
            names[nouns[:, term]],
        ]
    return [*pieces, ": how many?\n"]


def labelled_factor(values: np.ndarray, term: int, places: str) -> list[Piece]:
    """The two digits of a factor, each after its label."""
    both = digits(values, 2)
    return [piece for p, place in enumerate(places) for piece in (f"{term + 1}{place}", both[:, p : p + 1])]


def work(factors: np.ndarray, term: int) -> list[Piece]:
    """The worked digits of one product and its labelled result line."""
    left, right = factors[:, term].T
    pieces: list[Piece] = [" ", *labelled_factor(left, term, "wx"), "*", *labelled_factor(right, term, "yz"), "\n"]
    running = np.zeros_like(left)
    for i in range(2):
        for j in range(2):
            a, b = left // 10**i % 10, right // 10**j % 10
            shifted = a * b * 10 ** (i + j)
            running = running + shifted
            pieces += [digits(a, 1), "*", digits(b, 1), "=", digits(shifted, 4), ">", digits(running, 4), "\n"]
    result = digits(running, 4)
    labelled = [piece for p in range(4) for piece in (f"{term + 1}{_PLACES[p]}", result[:, p : p + 1])]
    return [*pieces, "=", *labelled, "\n"]


def column_sum(factors: np.ndarray) -> list[Piece]:
    """The column addition of the products, a line a place, and the answer."""
    products = factors.prod(axis=2)
    pieces: list[Piece] = []
    carry = np.zeros(len(factors), dtype=np.int64)
    for p, place in enumerate(_PLACES):
        running = carry
        for term in range(factors.shape[1]):
            digit = products[:, term] // 10**p % 10
            running = running + digit
            pieces += [f"{term + 1}{place}", digits(digit, 1), digits(running, 2)]
        carry = running // 10
        pieces += [f"{_SUM}{place}", digits(running, 1), "\n"]
    # The answer is read off the columns by their labels, then copied into the box at short distance.
    total = digits(products.sum(axis=1), 5)
    labelled = [piece for p, place in enumerate(_PLACES) for piece in (f"{_SUM}{place}", total[:, p : p + 1])]
    return [*pieces, *labelled, total[:, 4:], "\n", "</think>\n\n\\boxed{", total, "}"]


def solution(factors: np.ndarray, style: Style) -> list[Piece]:
    """The whole response. factors (n, terms, 2)."""
    terms = range(factors.shape[1])
    if style == "sequential":
        return [
            "<think>\n",
            *(piece for t in terms for piece in [f"{t + 1}:", *work(factors, t)]),
            *column_sum(factors),
        ]
    outlines = [f"{t + 1}w*{t + 1}y" for t in terms]
    return ["<think>\n", *fork(outlines, [work(factors, t) for t in terms]), *column_sum(factors)]


def plain_row(factors: list[list[int]], nouns: list[int], style: Style) -> dict[str, str]:
    """The same problem and the same steps in words and ordinary notation."""
    asked = ", ".join(f"{a} boxes of {b} {NOUNS[noun]}" for (a, b), noun in zip(factors, nouns, strict=True))
    bodies: list[list[Piece]] = []
    for a, b in factors:
        tens, ones = a * (b // 10 * 10), a * (b % 10)
        bodies.append([f" {a} * {b} = {a} * {b // 10 * 10} + {a} * {b % 10} = {tens} + {ones} = {a * b}\n"])
    if style == "forkjoin":
        steps = fork([f"the {NOUNS[noun]}, {a} * {b}" for (a, b), noun in zip(factors, nouns, strict=True)], bodies)
    else:
        steps = [piece for number, body in enumerate(bodies, 1) for piece in (f"{number}:", *body)]
    running, lines = factors[0][0] * factors[0][1], []
    for a, b in factors[1:]:
        lines.append(f"{running} + {a * b} = {running + a * b}\n")
        running += a * b
    text = "".join(map(str, ["<think>\n", *steps, *lines, "</think>\n\n\\boxed{", running, "}"]))
    prompt = f"There are {asked}. How many things are there in all?\n"
    return {"prompt": prompt, "text": text, "answer": str(running), "difficulty": str(len(factors))}
