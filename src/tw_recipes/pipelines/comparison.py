"""Two models on the same held-out problems: accuracy, tokens, critical path, wall clock, and what fork/join gains.

The sequential model is decoded by the same decoder with forking off, and no result depends on a clock. Correctness is
read from the response alone.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tw_core import TagIds, check_ids
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.decoding.engine import GREEDY
from tw_recipes.decoding.limits import Limits
from tw_recipes.decoding.lockstep_engine import LockstepEngine
from tw_recipes.decoding.rollout import LOST, Rollout

# Engine calls in flight: 200 problems took 7.0 s with 64, 14.2 s all at once (two threads, tiny model).
CALLS_IN_FLIGHT = 64


@dataclass(frozen=True)
class Measured:
    """One model on all problems; arrays have one entry a problem.

    Attributes:
        correct: Whether the boxed answer is right.
        tokens: T of each response.
        critical_path: L of each response, its token latency.
        well_formed: Whether the response ended by itself and has the format, with at least one block if it may fork.
        statuses: How many rollouts ended how.
        batch_seconds: Wall clock of all problems, `CALLS_IN_FLIGHT` engine calls at a time.
        single_seconds: Wall clock of single problems, one at a time.
        texts: The responses.
    """

    correct: np.ndarray
    tokens: np.ndarray
    critical_path: np.ndarray
    well_formed: np.ndarray
    statuses: dict[str, int]
    batch_seconds: float
    single_seconds: np.ndarray
    texts: list[str]

    def summary(self) -> dict[str, Any]:
        """The figures for results.json."""
        return {
            "accuracy": float(self.correct.mean()),
            "correct": int(self.correct.sum()),
            "problems": len(self.correct),
            "tokens": float(self.tokens.mean()),
            "token_latency": float(self.critical_path.mean()),
            "wall_seconds_single": float(self.single_seconds.mean()),
            "wall_seconds_all": self.batch_seconds,
            "status": self.statuses,
        }


def measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    grader: Any,
    *,
    fork: bool,
    single: int,
    max_total_tokens: int,
    max_thread_tokens: int,
    on_done: Callable[[int, str], None] | None = None,
) -> Measured:
    """Decode held-out problems greedily.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: {"prompt", "answer"}; the answer is used for grading only.
        grader: A `Grader`.
        fork: Whether the model may fork.
        single: How many problems are decoded once more, alone, for the wall clock at batch 1.
        max_total_tokens: Budget of a response.
        max_thread_tokens: Budget of a thread.
        on_done: Called with the number of problems done and a line of figures, for progress display.

    Raises:
        RuntimeError: The engine lost a call.
    """
    tags = TagIds.from_tokenizer(tokenizer)
    limits = Limits(max_total_tokens=max_total_tokens, max_thread_tokens=max_thread_tokens)
    engine = LockstepEngine(model, eos_ids=[tokenizer.eos_token_id])
    limits = limits if fork else limits.sequential()
    decoder = ForkJoinDecoder(engine, tags, limits, GREEDY, max_calls=CALLS_IN_FLIGHT)
    prompts = [tokenizer.encode(row["prompt"], add_special_tokens=False) for row in rows]
    rollouts, batch_seconds, singles = asyncio.run(_decode(decoder, prompts, single, on_done))
    lost = next((rollout for rollout in rollouts if rollout.status in LOST), None)
    if lost is not None:
        raise RuntimeError(f"decoding problem {lost.key} failed: {lost.reason}")
    texts = [rollout.text(tokenizer) for rollout in rollouts]
    return Measured(
        correct=np.array([grader.grade(text, row["answer"]).correct for text, row in zip(texts, rows, strict=True)]),
        tokens=np.array([rollout.stats.total_tokens for rollout in rollouts]),
        critical_path=np.array([rollout.stats.critical_path_tokens for rollout in rollouts]),
        well_formed=np.array([_well_formed(rollout, tags, fork) for rollout in rollouts]),
        statuses={status: sum(r.status == status for r in rollouts) for status in ("done", "length")},
        batch_seconds=batch_seconds,
        single_seconds=singles,
        texts=texts,
    )


def _well_formed(rollout: Rollout, tags: TagIds, fork: bool) -> bool:
    return rollout.complete and bool(check_ids(rollout.response_ids, tags, require_block=fork))


async def _decode(
    decoder: ForkJoinDecoder, prompts: list[list[int]], single: int, on_done: Callable[[int, str], None] | None
) -> tuple[list[Rollout], float, np.ndarray]:
    """All problems; then `single` of them, each alone. One start of the engine, which is warmed up before."""
    try:
        await decoder.decode(prompts[0], "warm-up")
        began = time.perf_counter()
        found = []
        async for entry in decoder.stream(prompts, max_trajectories=CALLS_IN_FLIGHT):
            found.append(entry)
            if on_done is not None:
                on_done(len(found), "")
        batch_seconds = time.perf_counter() - began
        singles = [(await decoder.decode(prompts[i], f"single-{i}")).seconds for i in range(single)]
    finally:
        await decoder.engine.aclose()
    return [rollout for _, rollout in sorted(found, key=lambda entry: entry[0])], batch_seconds, np.array(singles)


def compare(sequential: Measured, forkjoin: Measured) -> dict[str, dict[str, Any]]:
    """The two summaries, with the gains of fork/join beside its own figures.

    `speedup_tokens` is the mean over all problems of sequential tokens / fork/join critical path; the maximum is over
    the problems that fork/join solved (None if it solved none). `speedup_wall` is the ratio of the mean wall clocks,
    one problem at a time.
    """
    ratios = sequential.critical_path / forkjoin.critical_path
    gains = {
        "speedup_tokens": float(ratios.mean()),
        "speedup_tokens_max": float(ratios[forkjoin.correct].max()) if forkjoin.correct.any() else None,
        "speedup_wall": float(sequential.single_seconds.mean() / forkjoin.single_seconds.mean()),
        "speedup_wall_all": sequential.batch_seconds / forkjoin.batch_seconds,
        "format_correct": float(forkjoin.well_formed.mean()),
    }
    found = {"sequential": sequential.summary(), "forkjoin": forkjoin.summary() | gains}
    json.dumps(found, allow_nan=False)  # what is written can be read anywhere
    return found
