"""Statistics of graded samples; every number of a report comes from here.

    accuracy = pass@1   mean over problems of c / n (c of n samples correct)
    pass@k              mean over problems of 1 - C(n - c, k) / C(n, k), unbiased (arXiv:2107.03374)
    interval            n = 1: Wilson; n > 1: percentile bootstrap over problems, samples of one problem stay together
    speedup             per problem: mean tokens of the sequential samples / mean L of ours (SPEC section 5)

Guarded by tests/recipes/evaluation/test_metrics.py against numbers worked out by hand.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
_RESAMPLES = 10_000


class Sample(NamedTuple):
    """One graded response.

    Attributes:
        problem: `Problem.id`.
        sample: Which of the n samples.
        correct: The verdict.
        grade: Status of grading.
        extracted: The answer that was compared.
        status: Status of the rollout.
        total_tokens: T.
        critical_path_tokens: L, the token latency of what was run; T for a response decoded in one call.
        num_blocks: Blocks that forked.
        num_threads: Threads that ran.
        format_ok: The response is well-formed and no closer was forced.
        seconds: Wall-clock time of the trajectory.
    """

    problem: str
    sample: int
    correct: bool
    grade: str
    extracted: str | None
    status: str
    total_tokens: int
    critical_path_tokens: int
    num_blocks: int
    num_threads: int
    format_ok: bool
    seconds: float


class Interval(NamedTuple):
    """A 95 % interval and how it was made."""

    low: float
    high: float
    method: str


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one.

    Raises:
        ValueError: Not 0 <= correct <= n or not 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"expected 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def wilson(correct: int, n: int) -> Interval:
    """Wilson's score interval of a proportion, 95 %."""
    p, z2 = correct / n, Z95 * Z95
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(max(0.0, middle - half), min(1.0, middle + half), "Wilson, 95 %")


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of one value per problem, 95 %.

    Args:
        values: Shape (P,), one per problem.
        seed: Of the resampling.
    """
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    step = max(1, 4_000_000 // len(data))  # bounds memory
    means = [
        data[rng.integers(0, len(data), (min(step, _RESAMPLES - at), len(data)))].mean(axis=1)
        for at in range(0, _RESAMPLES, step)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(low), float(high), f"bootstrap over {len(data)} problems, {_RESAMPLES} resamples, 95 %")


def by_problem(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each problem, in first-seen order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.problem, []).append(sample)
    return groups


class Accuracy(NamedTuple):
    """pass@1 with its interval, and pass@k for the powers of two up to n and n itself."""

    value: float
    interval: Interval
    pass_at: dict[int, float]


def accuracy(samples: Sequence[Sample], seed: int = 0) -> Accuracy:
    """Accuracy of samples, the same number for every problem.

    Raises:
        ValueError: No samples, or problems with different numbers of them.
    """
    groups = by_problem(samples)
    counts = {len(group) for group in groups.values()}
    if len(counts) != 1:
        raise ValueError(f"every problem must have the same number of samples, got {sorted(counts)}; finish the run")
    n = counts.pop()
    correct = [sum(sample.correct for sample in group) for group in groups.values()]
    rates = [c / n for c in correct]
    interval = wilson(sum(correct), len(correct)) if n == 1 else bootstrap(rates, seed)
    ks = sorted({n, *(2**power for power in range(n.bit_length()) if 2**power <= n)})
    pass_at = {k: float(np.mean([pass_at_k(n, c, k) for c in correct])) for k in ks}
    return Accuracy(float(np.mean(rates)), interval, pass_at)


class Speedup(NamedTuple):
    """Token speedup over a sequential run.

    Attributes:
        mean: Mean over all problems that both runs have.
        ratio_of_means: Mean sequential tokens / mean L, over those problems.
        mean_correct: Mean over problems that both runs solve at least once, from correct samples alone; None if none.
        max_correct: The largest of those.
        per_problem: Problem -> speedup, all samples.
        wall: Mean over problems of sequential seconds / ours.
    """

    mean: float
    ratio_of_means: float
    mean_correct: float | None
    max_correct: float | None
    per_problem: dict[str, float]
    wall: float


def speedup(samples: Iterable[Sample], baseline: Iterable[Sample]) -> Speedup:
    """Speedup of `samples` over the sequential `baseline`, problem by problem.

    Raises:
        ValueError: The runs have no problem in common.
    """
    ours, theirs = by_problem(samples), by_problem(baseline)
    common = [name for name in ours if name in theirs]
    if not common:
        raise ValueError("the baseline has none of the problems; run it on the same data set")

    def tokens(name: str, correct: bool = False) -> tuple[float, float] | None:
        base = [s.total_tokens for s in theirs[name] if s.correct or not correct]
        path = [s.critical_path_tokens for s in ours[name] if s.correct or not correct]
        return (float(np.mean(base)), float(np.mean(path))) if base and path and np.mean(path) else None

    pairs = {name: pair for name in common if (pair := tokens(name)) is not None}
    if not pairs:
        raise ValueError("no response of this run has a token; nothing to compare")
    each = {name: base / path for name, (base, path) in pairs.items()}
    solved = [base / path for name in common if (pair := tokens(name, True)) is not None for base, path in [pair]]
    clocks = [
        float(np.mean([s.seconds for s in theirs[name]]) / np.mean([s.seconds for s in ours[name]])) for name in pairs
    ]
    bases, paths = zip(*pairs.values(), strict=True)
    return Speedup(
        mean=float(np.mean(list(each.values()))),
        ratio_of_means=float(np.mean(bases) / np.mean(paths)),
        mean_correct=float(np.mean(solved)) if solved else None,
        max_correct=max(solved, default=None),
        per_problem=each,
        wall=float(np.mean(clocks)),
    )


def measures(samples: Sequence[Sample]) -> dict[str, float]:
    """Plain means over all samples, by metric name.

    `threads_per_block` is the total of threads over the total of blocks, 0 without blocks.
    """
    blocks = sum(s.num_blocks for s in samples)
    seconds = [s.seconds for s in samples]
    return {
        "total_tokens": float(np.mean([s.total_tokens for s in samples])),
        "token_latency": float(np.mean([s.critical_path_tokens for s in samples])),
        "activation_ratio": float(np.mean([s.num_blocks > 0 for s in samples])),
        "blocks": blocks / len(samples),
        "threads_per_block": sum(s.num_threads for s in samples) / blocks if blocks else 0.0,
        "format_correctness": float(np.mean([s.format_ok for s in samples])),
        "finished": float(np.mean([s.status == "done" for s in samples])),
        "ungraded": float(np.mean([s.grade in ("timeout", "error") for s in samples])),
        "wall_s": float(np.mean(seconds)),
        "wall_s_p95": float(np.percentile(seconds, 95)),
    }
