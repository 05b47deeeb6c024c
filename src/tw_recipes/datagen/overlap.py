"""Numbers and runs of words that texts share: what code can say about independence and leaks.

Guarded by tests/recipes/datagen/test_overlap.py.
"""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WORD = re.compile(r"\w+|[^\w\s]")
_RESULT = re.compile(r"(?:=|≈|\\approx|\b(?:is|are|equals)(?=\s*[-$\d]))\s*([^\s=,;]+(?: ?[-+*/^] ?[^\s=,;]+)*)")
_OPENING = 20  # words of a thread that say what it is about

RUN = 8
"""Words of a run between siblings."""

LEAK_RUN = 6
"""Words of a run that an outline may not take from its thread."""


def numbers(text: str) -> set[str]:
    """The numbers of a text that mean something by themselves: two digits or more, without leading zeros."""
    return {number for number in all_numbers(text) if len(number) > 1}


def all_numbers(text: str) -> set[str]:
    """Every number of a text, single digits too."""
    return {_plain(number) for number in set(_NUMBER.findall(text))}


def _plain(number: str) -> str:
    if number.isdecimal():
        return number.lstrip("0") or "0"
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    whole, dot, rest = number.partition(".")
    return (whole.lstrip("0") or "0") + dot + rest


def runs(text: str, length: int = RUN) -> set[tuple[str, ...]]:
    """All runs of so many words; marks count as words."""
    words = _WORD.findall(text.casefold())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def results(text: str) -> list[str]:
    """What a text arrives at, in order: what stands to the right of "=", and numbers after "is"."""
    found = (value.strip(" .:;$").removesuffix("\\)").removesuffix("\\]") for value in _RESULT.findall(text))
    return [value for value in found if any(map(str.isalnum, value))]


def shared_numbers(bodies: Sequence[str], before: str) -> list[tuple[float, int]]:
    """For each thread: (share, count) of its own numbers that a sibling has too; `before` is common knowledge."""
    known = numbers(before)
    return _shared([numbers(body) - known for body in bodies])


def shared_runs(bodies: Sequence[str], before: str) -> list[tuple[float, int]]:
    """For each thread: (share, count) of its runs of words that a sibling has too, outside of `before`."""
    known = runs(before)
    return _shared([runs(body) - known for body in bodies])


def _shared(own: Sequence[set]) -> list[tuple[float, int]]:
    found = []
    for place, items in enumerate(own):
        others = set().union(*(own[i] for i in range(len(own)) if i != place))
        common = len(items & others)
        found.append((common / len(items) if items else 0.0, common))
    return found


def leaks(outline: str, bodies: Iterable[str], before: str) -> str | None:
    """What an outline gives away: a number, a result or a run of words that a thread has to find first.

    The opening of a thread (its first words) says what it is about; that an outline may say too.

    Args:
        outline: The plan.
        bodies: The block's threads.
        before: The question and the text before the block.

    Returns:
        The first such piece, None if there is none.
    """
    said, said_runs, said_results = numbers(outline), runs(outline, LEAK_RUN), set(results(outline))
    if not (said or said_runs or said_results):
        return None
    for body in bodies:
        opening, rest = _opened(body)
        known = f"{before}\n{opening}"
        if met := said & numbers(rest):
            for number in sorted(met - numbers(known)):
                return number
        reached = results(rest) if said_results else []
        # A single character counts only where the thread ends with it: "k = 1" may well be its case.
        for value in [value for value in reached if len(value) > 1] + reached[-1:]:
            if value in said_results and value not in (known if len(value) > 1 else results(known)):
                return value
        if copied := said_runs & runs(rest, LEAK_RUN):
            for run in sorted(copied - runs(known, LEAK_RUN)):
                return " ".join(run)
    return None


def _opened(body: str) -> tuple[str, str]:
    """(opening, rest) of a thread: its first words, at most half of it."""
    words = list(_WORD.finditer(body))
    cut = min(_OPENING, len(words) // 2)
    at = words[cut].start() if cut < len(words) else len(body)
    return body[:at], body[at:]
