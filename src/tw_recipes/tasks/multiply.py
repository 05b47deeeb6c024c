r"""The product of several integers: one long chain, or a tree of independent partial products.

    prompt       1wA41wB91wC2*2wA7…=?          294 * …, labelled digits from the lowest place up (see longhand.py)
    sequential   factor after factor: ((f1 f2) f3) f4 …, each step a long multiplication
    fork/join    the factors in halves down to pairs; the pairs of a level are threads of one block; a larger product
                 forks into limbs, its multiplier's digits shared among threads, which the join adds up
    nested       each half is a thread of its own, whose blocks stand inside it

Both multiply the same number of digit pairs; in the tree most of them can be done at once. The largest product alone
has half of the work, which is why it must fork too. Source: the public reproduction of arXiv:2512.07843 multiplies 5 to
8 integers below 1000; layouts and labels are ours. Tests: tests/recipes/tasks/test_multiply.py.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tw_recipes.evaluation.grading import ExactGrader
from tw_recipes.tasks.longhand import Labelled, Limb, Notation, Plain
from tw_recipes.tasks.splits import Search, Split, Style, check_rows, is_test, mix, stream
from tw_recipes.tasks.text import Pieces, fork, strings
from tw_recipes.tasks.tokenizer import build_tokenizer

LABEL = r"[1-9][a-z][A-X]"


@dataclass(frozen=True)
class ProductOfIntegers:
    """The task; every method is deterministic in its arguments.

    Attributes:
        least: Fewest factors of a problem, 3 to 8.
        most: Most factors. The numbers between are equally frequent.
        nested: Whether fork/join solutions nest blocks in threads; False puts one block after another.
    """

    least: int = 5
    most: int = 8
    nested: bool = False
    name: str = "multiply"

    def __post_init__(self) -> None:
        if not 3 <= self.least <= self.most <= 8:
            raise ValueError(f"least and most must satisfy 3 <= least <= most <= 8, got {self.least} and {self.most}")

    def problems(self, count: int, *, seed: int, split: Split = "train") -> list[tuple[int, ...]]:
        """Distinct problems of one split: their factors, 0..999."""
        rng = stream(count, seed=seed, split=split, salt=100 * self.least + self.most)
        table, keys = np.empty((0, self.most), dtype=np.int64), np.empty(0, dtype=np.uint64)
        search = Search(count)
        while search.wants_more(len(keys)):
            drawn = rng.integers(0, 1000, (2 * count + 64, 1 + self.most))
            lengths, drawn = self.least + drawn[:, 0] * (self.most + 1 - self.least) // 1000, drawn[:, 1:]
            drawn[np.arange(self.most) >= lengths[:, None]] = -1
            key = lengths.astype(np.uint64)
            for column in drawn.T:
                key = mix(key ^ (column + 1).astype(np.uint64))
            mine = is_test(key) == (split == "test")
            table, keys = np.concatenate([table, drawn[mine]]), np.concatenate([keys, key[mine]])
            first = np.sort(np.unique(keys, return_index=True)[1])
            table, keys = table[first], keys[first]
        return [tuple(value for value in row if value >= 0) for row in table[:count].tolist()]

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
            plain: Ordinary notation, for the tokenizer of a real model.

        Returns:
            Rows {"prompt", "text", "answer", "difficulty"}; the difficulty is the number of factors.
        """
        check_rows(style, offset)
        problems = self.problems(offset + count, seed=seed, split=split)[offset:]
        if plain:
            return [self._plain_row(problem, style) for problem in problems]
        rows: list[dict[str, str]] = [{} for _ in problems]
        for length in range(self.least, self.most + 1):
            places = [i for i, problem in enumerate(problems) if len(problem) == length]
            if places:
                made = self._labelled_rows(np.array([problems[i] for i in places]), style)
                for place, row in zip(places, made, strict=True):
                    rows[place] = row
        return rows

    def tokenizer(self) -> Any:
        """One token a digit, label and tag."""
        labels = set()
        for length in range(self.least, self.most + 1):
            for style in ("sequential", "forkjoin"):
                row = self._labelled_rows(np.zeros((1, length), dtype=np.int64), style)[0]
                labels |= set(re.findall(LABEL, row["prompt"] + row["text"]))
        return build_tokenizer([*sorted(labels), *"0123456789", *"*=-: .?{}", "\n", "\\boxed"], pattern=LABEL)

    def grader(self) -> ExactGrader:
        """Compares the boxed answer after `</think>` with the row's answer; it never sees the prompt."""
        return ExactGrader()

    def _labelled_rows(self, factors: np.ndarray, style: Style) -> list[dict[str, str]]:
        length = factors.shape[1]
        notation = Labelled(factors)
        written = [[*notation.factor(i).written(), "*"] for i in range(length)]
        prompt = [piece for pieces in written for piece in pieces][:-1]
        texts = strings(self._solution(notation, length, style))
        answers = [f"{math.prod(problem):0{3 * length}d}"[::-1] for problem in factors.tolist()]
        return [
            {"prompt": prompt, "text": text, "answer": answer, "difficulty": str(length)}
            for prompt, text, answer in zip(strings([*prompt, "=?\n"]), texts, answers, strict=True)
        ]

    def _plain_row(self, factors: tuple[int, ...], style: Style) -> dict[str, str]:
        text = "".join(map(str, self._solution(Plain(factors), len(factors), style)))
        prompt = f"What is {' * '.join(map(str, factors))}?\n"
        answer = str(math.prod(factors))
        return {"prompt": prompt, "text": text, "answer": answer, "difficulty": str(len(factors))}

    def _solution(self, notation: Notation[Any], length: int, style: Style) -> Pieces:
        if style == "sequential":
            work, value = _chain(notation, length)
        elif self.nested:
            work, value = _nested(notation, _tree(range(length)))
        else:
            work, value = _levels(notation, _tree(range(length)))
        return ["<think>\n", *work, *notation.answer(value)]


def _chain(notation: Notation[Any], length: int) -> tuple[Pieces, Any]:
    value, pieces = notation.factor(0), []
    for step in range(1, length):
        work, value = notation.product(step, value, notation.factor(step))
        pieces += [f"{step}: ", *work]
    return pieces, value


@dataclass(frozen=True)
class _Node:
    """A product of the factors `span`; a single factor has no number."""

    span: range
    number: int = 0
    halves: tuple["_Node", ...] = ()

    @property
    def height(self) -> int:
        return 1 + max(half.height for half in self.halves) if self.halves else 0

    def walk(self) -> list["_Node"]:
        """Every product below and including this one, halves first."""
        return [node for half in self.halves for node in half.walk()] + ([self] if self.halves else [])


def _tree(span: range, first: int = 1) -> _Node:
    """Halves down to single factors; products are numbered from `first` on, halves first."""
    if len(span) == 1:
        return _Node(span)
    middle = (len(span) + 1) // 2
    left = _tree(span[:middle], first)
    right = _tree(span[middle:], first + middle - 1)
    return _Node(span, first + len(span) - 2, (left, right))


def _limbs(width: int) -> list[Limb]:
    """The multiplier's digits shared among threads: one each, from six digits on two each."""
    size = 1 if width <= 3 else 2
    starts = range(0, width, size)
    return [Limb(number, start, min(start + size, width)) for number, start in enumerate(starts)]


def _levels(notation: Notation[Any], tree: _Node) -> tuple[Pieces, Any]:
    """Flat format: a block for all pairs, then one block a level for the limbs of its products."""
    values: dict[range, Any] = {node: notation.factor(node.start) for node in (range(i, i + 1) for i in tree.span)}
    pieces: Pieces = []
    for height in range(1, tree.height + 1):
        nodes = [node for node in tree.walk() if node.height == height]
        sides = [(node, *(values[half.span] for half in node.halves)) for node in nodes]
        if height == 1:
            made = [(node, *notation.product(node.number, left, right)) for node, left, right in sides]
            values |= {node.span: value for node, _, value in made}
            if len(nodes) == 1:
                pieces += made[0][1]
                continue
            outlines = [f"{notation.name(left)}*{notation.name(right)}" for _, left, right in sides]
            pieces += fork(outlines, [[" ", *work] for _, work, _ in made])
            continue
        threads = [
            [notation.limb(node.number, left, right, limb) for limb in _limbs(notation.width(right))]
            for node, left, right in sides
        ]
        flat = [thread for group in threads for thread in group]
        pieces += fork([outline for outline, _, _ in flat], [[" ", *work] for _, work, _ in flat])
        for (node, left, right), group in zip(sides, threads, strict=True):
            work, values[node.span] = notation.join(node.number, left, right, [part for _, _, part in group])
            pieces += work
    return pieces, values[tree.span]


def _nested(notation: Notation[Any], node: _Node) -> tuple[Pieces, Any]:
    """Nested format: the halves of a product in two threads, where both are products; then its limbs in a block."""
    if not node.halves:
        return [], notation.factor(node.span.start)
    (left_work, left), (right_work, right) = (_nested(notation, half) for half in node.halves)
    if node.height == 1:
        return notation.product(node.number, left, right)
    pieces = left_work
    if right_work:
        names = [[notation.name(notation.factor(i)) for i in half.span] for half in node.halves]
        plans = ["*".join(factors) for factors in names]
        pieces = fork(plans, [[f" {plan}\n", *work] for plan, work in zip(plans, (left_work, right_work), strict=True)])
    threads = [notation.limb(node.number, left, right, limb) for limb in _limbs(notation.width(right))]
    block = fork([outline for outline, _, _ in threads], [[" ", *work] for _, work, _ in threads])
    work, value = notation.join(node.number, left, right, [part for _, _, part in threads])
    return [*pieces, *block, *work], value
