r"""Problems of which only some decompose: a model must learn when to fork and when not to.

    kind "parallel"   the sum of products (products.py): four independent products, then their sum
    kind "serial"     the same products one after another: the lower two digits of each result are the next left factor

        prompt        1w41x2 by 1y91z9, then by 2y52z4, then by 3y33z8, then by 4y64z4: the last?
        work          1: 1w41x2*1y91z9 … =1a61b71c31d2
                      2: 2w62x7*2y52z4 …
        answer        \boxed{…}           the last result, four digits

A serial problem has one solution text in both styles: nothing in it can be done at once. The prompt tells the kinds
apart. Tests: tests/recipes/tasks/test_adaptive.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tw_recipes.evaluation.grading import ExactGrader
from tw_recipes.tasks import products
from tw_recipes.tasks.splits import Search, Split, Style, check_rows, is_test, mix, stream
from tw_recipes.tasks.text import Piece, digits, strings
from tw_recipes.tasks.tokenizer import build_tokenizer


@dataclass(frozen=True)
class SomeDecompose:
    """The task; every method is deterministic in its arguments.

    Attributes:
        terms: Products a problem has, 2 to 4.
        parallel_share: Share of problems that decompose.
    """

    terms: int = 4
    parallel_share: float = 0.5
    name: str = "adaptive"

    def __post_init__(self) -> None:
        if self.terms not in (2, 3, 4):
            raise ValueError(f"terms must be 2, 3 or 4, got {self.terms}")
        if not 0 <= self.parallel_share <= 1:
            raise ValueError(f"parallel_share must be within 0..1, got {self.parallel_share}")

    def problems(self, count: int, *, seed: int, split: Split = "train") -> tuple[np.ndarray, np.ndarray]:
        """Distinct problems of one split.

        Returns:
            (factors, parallel): shapes (count, terms, 2) int64 and (count,) bool. The left factors of a serial problem
            are those that its solution meets.
        """
        rng = stream(count, seed=seed, split=split, salt=1000 + self.terms)
        factors, parallel = np.empty((0, self.terms, 2), dtype=np.int64), np.empty(0, dtype=bool)
        search = Search(count)
        while search.wants_more(len(factors)):
            numbers = rng.integers(0, 100, (2 * count + 64, 2 * self.terms + 1))
            kinds, drawn = numbers[:, 0] < 100 * self.parallel_share, numbers[:, 1:].reshape(-1, self.terms, 2)
            for term in range(1, self.terms):
                following = drawn[:, term - 1].prod(axis=1) % 100
                drawn[:, term, 0] = np.where(kinds, drawn[:, term, 0], following)
            mine = is_test(_keys(drawn, kinds)) == (split == "test")
            factors, parallel = np.concatenate([factors, drawn[mine]]), np.concatenate([parallel, kinds[mine]])
            first = np.sort(np.unique(_keys(factors, parallel), return_index=True)[1])
            factors, parallel = factors[first], parallel[first]
        return factors[:count], parallel[:count]

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
        """Data set rows, see `SumOfProducts.rows`; the difficulty is the kind, "parallel" or "serial"."""
        check_rows(style, offset)
        factors, parallel = (part[offset:] for part in self.problems(offset + count, seed=seed, split=split))
        nouns = np.random.default_rng(seed).integers(0, len(products.NOUNS), (offset + count, self.terms))[offset:]
        if plain:
            return [
                _named(products.plain_row(pairs, named, style), "parallel") if fork else _plain_serial(pairs)
                for pairs, named, fork in zip(factors.tolist(), nouns.tolist(), parallel, strict=True)
            ]
        rows: list[dict[str, str]] = [{} for _ in range(count)]
        for kind, which in (("parallel", parallel), ("serial", ~parallel)):
            if which.any():
                chosen = factors[which]
                if kind == "parallel":
                    prompts, texts = products.question(chosen, nouns[which]), products.solution(chosen, style)
                    answers = digits(chosen.prod(axis=2).sum(axis=1), 5)
                else:
                    prompts, texts, answers = (
                        _question(chosen),
                        _solution(chosen),
                        digits(chosen[:, -1].prod(axis=1), 4),
                    )
                made = zip(strings(prompts), strings(texts), strings([answers]), strict=True)
                for place, (prompt, text, answer) in zip(np.flatnonzero(which), made, strict=True):
                    rows[place] = {"prompt": prompt, "text": text, "answer": answer, "difficulty": kind}
        return rows

    def tokenizer(self) -> Any:
        """One token a digit, label, word and tag."""
        return build_tokenizer([*products.vocabulary(), " by ", ", then by ", ": the last?"])

    def grader(self) -> ExactGrader:
        """Compares the boxed answer after `</think>` with the row's answer; it never sees the prompt."""
        return ExactGrader()


def _keys(factors: np.ndarray, parallel: np.ndarray) -> np.ndarray:
    return mix(products.problem_keys(factors)) ^ parallel.astype(np.uint64)


def _named(row: dict[str, str], kind: str) -> dict[str, str]:
    return {**row, "difficulty": kind}


def _question(factors: np.ndarray) -> list[Piece]:
    pieces: list[Piece] = products.labelled_factor(factors[:, 0, 0], 0, "wx")
    for term in range(factors.shape[1]):
        pieces += [", then by " if term else " by ", *products.labelled_factor(factors[:, term, 1], term, "yz")]
    return [*pieces, ": the last?\n"]


def _solution(factors: np.ndarray) -> list[Piece]:
    terms = range(factors.shape[1])
    work = [piece for term in terms for piece in (f"{term + 1}:", *products.work(factors, term))]
    return ["<think>\n", *work, "</think>\n\n\\boxed{", digits(factors[:, -1].prod(axis=1), 4), "}"]


def _plain_serial(factors: list[list[int]]) -> dict[str, str]:
    start, by = factors[0][0], [right for _, right in factors]
    then = ", then those by ".join(map(str, by[1:]))
    steps = []
    for number, (left, right) in enumerate(factors, 1):
        tens, ones = right // 10 * 10, right % 10
        sum_ = f"{left * tens} + {left * ones} = {left * right}"
        steps.append(f"{number}: {left} * {right} = {left} * {tens} + {left} * {ones} = {sum_}\n")
    answer = str(factors[-1][0] * factors[-1][1])
    prompt = (
        f"Multiply {start} by {by[0]}, then the last two digits of the result by {then}. What is the last result?\n"
    )
    text = f"<think>\n{''.join(steps)}</think>\n\n\\boxed{{{answer}}}"
    return {"prompt": prompt, "text": text, "answer": answer, "difficulty": "serial"}
