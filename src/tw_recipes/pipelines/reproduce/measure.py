"""Decoding of problems into a file of trajectories, what the responses are worth, and wall clock by batch size.

    problems ──ForkJoinDecoder──► trajectories.jsonl (goes on after a kill) ──grade──► figures of one stage

Held-out problems are decoded by `LockstepEngine`, whose results do not depend on a clock. Wall clock is measured
greedily with what a user would run in this process: `TransformersEngine` (continuous batching) on a CPU,
`LockstepEngine` (CUDA graphs) on a GPU.
Tests: tests/recipes/pipelines/test_reproduce_measure.py.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tw_core import TagIds, parse
from tw_core.grammar import Block, Element
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.decoding.engine import GREEDY, Engine, Sampling
from tw_recipes.decoding.limits import Limits
from tw_recipes.decoding.lockstep_engine import LockstepEngine
from tw_recipes.decoding.rollout import LOST
from tw_recipes.decoding.transformers_engine import TransformersEngine
from tw_recipes.evaluation.metrics import wilson
from tw_recipes.rollout import Prompt, read_trajectories, rollout

IN_FLIGHT = {"cpu": 128, "cuda": 256}  # trajectories: bounds the memory of the cache


def limits_for(rows: Sequence[Mapping[str, str]], tokenizer: Any, *, fork: bool) -> Limits:
    """Budgets with some room over the longest solution of `rows`, which have fork/join text."""
    longest = max(len(tokenizer.encode(row["text"])) for row in rows)
    limits = Limits(max_total_tokens=longest + longest // 8 + 16, max_thread_tokens=longest)
    return limits if fork else limits.sequential()


def decode(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    path: Path,
    *,
    limits: Limits,
    sampling: Sampling = GREEDY,
    units: bool = False,
) -> list[dict[str, Any]]:
    """One trajectory a problem, in the order of `rows`; those that the file has are not decoded again unless lost.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: {"prompt", "answer"}; answers are copied, the model never sees them.
        path: The .jsonl file.
        limits: Budgets; `limits.sequential()` never forks.
        sampling: How tokens are drawn; with a seed a problem's response does not depend on the others.
        units: Whether the file holds what each engine call saw and wrote.

    Returns:
        Rows of `tw_recipes.rollout.trajectory_row`.

    Raises:
        RuntimeError: The engine lost a call.
    """
    engine: Engine = LockstepEngine(model, eos_ids=[tokenizer.eos_token_id])
    decoder = ForkJoinDecoder(engine, TagIds.from_tokenizer(tokenizer), limits, sampling)
    # Calls of one length in a wave: the shorter ones are padded, and at their end computed on unread.
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["prompt"]))
    prompts = (
        Prompt(
            f"{place:05d}",
            tokenizer.encode(rows[place]["prompt"], add_special_tokens=False),
            {"prompt": rows[place]["prompt"], "answer": rows[place]["answer"]},
        )
        for place in order
    )
    summary = rollout(prompts, decoder, tokenizer, path, concurrency=IN_FLIGHT[model.device.type], units=units)
    found = sorted(read_trajectories(path), key=lambda row: row["id"])
    if summary.failed or len(found) != len(rows):
        lost = next((row["reason"] for row in found if row["status"] in LOST), "a line is missing")
        raise RuntimeError(f"{path}: not every problem has a trajectory: {lost}; run again, the rest is kept")
    return found


def figures(
    trajectories: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, str]], grader: Any
) -> dict[str, Any]:
    """What the responses to `rows` are worth.

    Returns:
        Means over all problems, and lists with one entry a problem: "correct", "latency", "tokens".
        "threads_right": shares of first and of later threads whose text is that of the row's own solution.
    """
    correct = [grader.grade(t["text"], row["answer"]).correct for t, row in zip(trajectories, rows, strict=True)]
    count = len(correct)
    interval = wilson(sum(correct), count)

    def mean(values: Sequence[Any]) -> float:
        return sum(map(float, values)) / count

    return {
        "problems": count,
        "accuracy": mean(correct),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "token_latency": mean([t["token_latency"] for t in trajectories]),
        "total_tokens": mean([t["stats"]["total_tokens"] for t in trajectories]),
        "activation_ratio": mean([t["forks"] > 0 for t in trajectories]),
        "threads": mean([t["forked_threads"] for t in trajectories]),
        "format_correctness": mean([t["format_ok"] and t["status"] == "done" for t in trajectories]),
        "finished": mean([t["status"] == "done" for t in trajectories]),
        "threads_right": threads_right([t["text"] for t in trajectories], [row["text"] for row in rows]),
        "correct": correct,
        "latency": [t["token_latency"] for t in trajectories],
        "tokens": [t["stats"]["total_tokens"] for t in trajectories],
    }


def threads_right(texts: Sequence[str], solutions: Sequence[str]) -> dict[str, float | None]:
    """Share of threads that read as in the solution, of the first of a block and of the later ones; None without any.

    Responses without a block are left out: they were not forked. Of others every thread of the solution counts.
    """
    counts = {"first": [0, 0], "later": [0, 0]}
    for text, solution in zip(texts, solutions, strict=True):
        found = _threads(text)
        if not found:
            continue
        for (block, number), body in _threads(solution).items():
            entry = counts["first" if number == 0 else "later"]
            entry[0] += found.get((block, number)) == body
            entry[1] += 1
    return {name: right / total if total else None for name, (right, total) in counts.items()}


def _threads(text: str) -> dict[tuple[str, int], str]:
    """(path of the block, place of the thread) -> the thread's text."""
    found: dict[tuple[str, int], str] = {}

    def walk(element: Element, path: str) -> None:
        blocks = [item for item in element.items if isinstance(item, Block)]
        for at, block in enumerate(blocks):
            for place, thread in enumerate(block.threads):
                found[f"{path}/{at}", place] = thread.text.strip()
                walk(thread, f"{path}/{at}.{place}")

    walk(parse(text), "")
    return found


def wall_clock(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    *,
    limits: Limits,
    batches: Sequence[int],
    timed: int,
) -> dict[str, float]:
    """Seconds a problem with so many problems in flight, greedy, after a warm-up.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Problems.
        limits: Budgets.
        batches: Problems in flight.
        timed: Problems decoded for each; at least as many as are in flight.

    Returns:
        str(batch) -> seconds a problem.
    """
    if not batches:
        return {}
    prompts = [tokenizer.encode(row["prompt"], add_special_tokens=False) for row in rows]

    async def run() -> dict[str, float]:
        chosen = TransformersEngine if model.device.type == "cpu" else LockstepEngine
        engine: Engine = chosen(model, eos_ids=[tokenizer.eos_token_id])
        decoder = ForkJoinDecoder(engine, TagIds.from_tokenizer(tokenizer), limits, GREEDY)
        found = {}
        try:
            await decoder.decode(prompts[0], "warm-up")
            for batch in batches:
                asked = [prompts[place % len(prompts)] for place in range(max(timed, batch))]
                began = time.perf_counter()
                async for _ in decoder.stream(asked, max_trajectories=batch):
                    pass
                found[str(batch)] = (time.perf_counter() - began) / len(asked)
        finally:
            await engine.aclose()
        return found

    return asyncio.run(run())
