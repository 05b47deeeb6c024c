"""Stage 2, self-training: which of a model's own trajectories become training data (SPEC section 7).

    trajectories ──judge──► finished, well-formed, right, new ──balance──► a training set
                     └────► a reason for each that is not                └► surplus, with a reason

`self_train_select` does both on a list. For files that do not fit in memory `judge` and `balance` are used apart, as
`tw_recipes.datagen.rounds` does: the first pass keeps a few numbers of each trajectory, the second copies the chosen.
Source: arXiv:2512.07843, self-training. Guarded by tests/recipes/datagen/test_self_training.py.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from tw_core import check_format
from tw_recipes.evaluation.grading import Grader

SEQUENTIAL = -1
"""Bin of trajectories that never forked."""

_CHUNK = 256  # trajectories graded at once
_GRADERS = 8  # threads that wait for the grader


class Candidate(NamedTuple):
    """What the choice needs to know of one trajectory.

    Attributes:
        key: Name of the trajectory.
        problem: Name of its problem.
        acceleration: 1 - token latency / tokens, of what was run at once.
        forked: Whether it forked.
    """

    key: str
    problem: str
    acceleration: float
    forked: bool


class Selection(NamedTuple):
    """A training set from a model's own trajectories.

    Attributes:
        rows: {"id", "prompt", "text", "answer", "source", "acceleration"}, in the order of the trajectories.
        dropped: How many trajectories were left out for which reason.
        examples: Names of the first trajectories of each reason.
    """

    rows: list[dict[str, Any]]
    dropped: Counter[str]
    examples: dict[str, list[str]]


def self_train_select(
    trajectories: Iterable[Mapping[str, Any]],
    grader: Grader,
    *,
    end: str = "",
    per_problem: int = 4,
    max_bin_share: float = 0.5,
    bins: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
    max_sequential_share: float = 0.2,
    nested: bool = True,
) -> Selection:
    """Choose training data among a model's own trajectories.

    Args:
        trajectories: Lines of `threadweaver rollout` (`tw_recipes.rollout.trajectory_row`) with the columns "prompt"
            and "answer". Read once; what is kept is held.
        grader: Decides whether the response's answer is right.
        end: End-of-sequence text that is cut off the responses, `tokenizer.eos_token`.
        per_problem: At most so many of one problem, spread over the accelerations they have.
        max_bin_share: No bin of acceleration holds a larger share of the forked ones, as far as there are others.
        bins: Edges of the bins of acceleration, ascending.
        max_sequential_share: At most this share of the result never forked.
        nested: Whether blocks inside threads are well-formed.

    Returns:
        The rows that `threadweaver sft` reads, and what was left out why.

    Raises:
        ValueError: An option out of range.
        KeyError: A trajectory lacks a column.
    """
    rows: dict[str, dict[str, Any]] = {}
    candidates: list[Candidate] = []
    dropped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for row, verdict in judge(trajectories, grader, end=end, nested=nested):
        if isinstance(verdict, Candidate):
            candidates.append(verdict)
            rows[verdict.key] = training_row(row, verdict, end)
        else:
            note(dropped, examples, verdict, key_of(row))
    chosen, surplus = balance(
        candidates,
        per_problem=per_problem,
        max_bin_share=max_bin_share,
        bins=bins,
        max_sequential_share=max_sequential_share,
    )
    for key, reason in surplus.items():
        note(dropped, examples, reason, key)
    return Selection([row for key, row in rows.items() if key in chosen], dropped, examples)


def judge(
    trajectories: Iterable[Mapping[str, Any]], grader: Grader, *, end: str = "", nested: bool = True
) -> Iterator[tuple[Mapping[str, Any], Candidate | str]]:
    """Pair every trajectory with a `Candidate`, or with the reason why it is no training data.

    Reasons: "not_finished" (the engine failed or a budget ran out), "forced_closer" (the decoder had to close an
    element), "format", "duplicate" (the same problem and the same text up to white space), "ungraded" (the grader
    timed out or found no answer), "wrong_answer". The order is kept and little is read ahead.

    Args:
        trajectories: As in `self_train_select`.
        grader: As there.
        end: As there.
        nested: As there.
    """
    seen: set[bytes] = set()
    source = iter(trajectories)
    with ThreadPoolExecutor(_GRADERS, thread_name_prefix="judge") as threads:
        while chunk := list(islice(source, _CHUNK)):
            reasons = [_shape_problem(row, end, nested, seen) for row in chunk]
            graded = threads.map(
                lambda pair: None if pair[1] else grader.grade(_response(pair[0], end), str(pair[0]["answer"])),
                zip(chunk, reasons, strict=True),
            )
            for row, reason, grade in zip(chunk, reasons, graded, strict=True):
                if grade is not None and not grade.correct:
                    reason = "wrong_answer" if grade.status == "graded" else "ungraded"
                yield row, reason or _candidate(row)


def balance(
    candidates: Sequence[Candidate],
    *,
    per_problem: int = 4,
    max_bin_share: float = 0.5,
    bins: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
    max_sequential_share: float = 0.2,
) -> tuple[set[str], dict[str, str]]:
    """Choose among good trajectories so that no problem, no acceleration and no plain text dominates.

    Args:
        candidates: All good trajectories.
        per_problem: As in `self_train_select`, like all further options.
        max_bin_share: See `self_train_select`.
        bins: See `self_train_select`.
        max_sequential_share: See `self_train_select`.

    Returns:
        (keys that were chosen, key -> "surplus_problem", "surplus_acceleration" or "surplus_sequential").

    Raises:
        ValueError: An option out of range, or a key that stands twice.
    """
    _check(per_problem, max_bin_share, bins, max_sequential_share)
    bin_of = {
        c.key: int(np.searchsorted(bins, c.acceleration, "right")) if c.forked else SEQUENTIAL for c in candidates
    }
    if len(bin_of) != len(candidates):
        raise ValueError("candidates must have distinct keys, got a key twice; name every trajectory once")
    order = sorted(candidates, key=lambda c: _hash(c.key))
    surplus: dict[str, str] = {}
    by_problem: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for candidate in order:
        by_problem[candidate.problem][bin_of[candidate.key]].append(candidate.key)
    kept: dict[int, list[str]] = defaultdict(list)
    for groups in by_problem.values():
        # One of each acceleration in turn, the fastest first.
        columns = [groups[place] for place in sorted(groups, reverse=True)]
        turns = [column[i] for i in range(max(map(len, columns))) for column in columns if i < len(column)]
        for place, key in enumerate(turns):
            if place < per_problem:
                kept[bin_of[key]].append(key)
            else:
                surplus[key] = "surplus_problem"
    sequential = kept.pop(SEQUENTIAL, [])
    cap = _cap([len(keys) for keys in kept.values()], max_bin_share)
    chosen: set[str] = set()
    for keys in kept.values():
        chosen.update(keys[:cap])
        surplus.update(dict.fromkeys(keys[cap:], "surplus_acceleration"))
    room = len(sequential)
    if max_sequential_share < 1:
        room = int(max_sequential_share / (1 - max_sequential_share) * len(chosen))
    chosen.update(sequential[:room])
    surplus.update(dict.fromkeys(sequential[room:], "surplus_sequential"))
    return chosen, surplus


def training_row(row: Mapping[str, Any], candidate: Candidate, end: str = "") -> dict[str, Any]:
    """The data set row of a chosen trajectory."""
    return {
        "id": candidate.key,
        "prompt": row["prompt"],
        "text": _response(row, end),
        "answer": str(row["answer"]),
        "source": "self_training",
        "acceleration": candidate.acceleration,
    }


def key_of(row: Mapping[str, Any]) -> str:
    """The name of a trajectory."""
    return str(row["key"])


def note(dropped: Counter[str], examples: dict[str, list[str]], reason: str, key: str, limit: int = 3) -> None:
    """Count a trajectory that was left out."""
    dropped[reason] += 1
    found = examples.setdefault(reason, [])
    if len(found) < limit:
        found.append(key)


def _response(row: Mapping[str, Any], end: str) -> str:
    return row["text"].removesuffix(end) if end else row["text"]


def _shape_problem(row: Mapping[str, Any], end: str, nested: bool, seen: set[bytes]) -> str:
    if row["status"] != "done":
        return "not_finished"
    if row["forced"]:
        return "forced_closer"
    text = _response(row, end)
    if not check_format(text, nested=nested):
        return "format"
    digest = hashlib.blake2b(f"{row['prompt']}\0{' '.join(text.split())}".encode(), digest_size=16).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return ""


def _candidate(row: Mapping[str, Any]) -> Candidate:
    total = row["stats"]["total_tokens"]
    # token_latency, not the critical path: a block that the model wrote in one call has saved nothing.
    return Candidate(
        key=key_of(row),
        problem=row["prompt"],
        acceleration=1 - row["token_latency"] / total if total else 0.0,
        forked=row["forks"] > 0,
    )


def _cap(sizes: Sequence[int], share: float) -> int:
    """The largest bin size with which no bin exceeds `share` of all, or an even share where there are fewer bins."""
    if not sizes:
        return 0
    share = max(share, 1 / len(sizes))
    cap = max(sizes)
    while cap > 1 and cap > share * sum(min(size, cap) for size in sizes) + 1e-9:
        cap -= 1
    return cap


def _hash(key: str) -> bytes:
    """An order that has nothing to do with how keys are written, and is the same everywhere."""
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def _check(per_problem: int, max_bin_share: float, bins: Sequence[float], max_sequential_share: float) -> None:
    if per_problem < 1:
        raise ValueError(f"per_problem must be at least 1, got {per_problem}")
    if not 0 < max_bin_share <= 1:
        raise ValueError(f"max_bin_share must be in (0, 1], got {max_bin_share}")
    if not 0 <= max_sequential_share <= 1:
        raise ValueError(f"max_sequential_share must be in [0, 1], got {max_sequential_share}")
    if list(bins) != sorted(set(bins)):
        raise ValueError(f"bins must ascend, got {list(bins)}")
