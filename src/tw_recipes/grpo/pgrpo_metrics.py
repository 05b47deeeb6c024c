"""Metrics of a batch of rollouts, over all processes, and the file in which rollouts can be looked at.

Tests: tests/recipes/grpo/test_pgrpo_trainer.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

STATUSES = ("done", "length", "error", "cancelled")
_SUMS = ("rollouts", "total", "latency", "acceleration", "activated", "forks", "threads", "well_formed", "seconds")


def batch_metrics(rows: Sequence[Mapping[str, Any]], retried: int, accelerator: Any) -> dict[str, float]:
    """Means over the rollouts of all processes.

    Args:
        rows: Rows of `trajectory_row`.
        retried: Rollouts of this process that were decoded again.
        accelerator: Of the trainer; every process must call.

    Returns:
        rollout/token_latency (L of what was run), total_tokens, acceleration, activation_ratio, threads_per_block,
        format_correctness, seconds, retried (a count), and the share of each status.
    """
    sums = dict.fromkeys((*_SUMS, *STATUSES), 0.0)
    for row in rows:
        total, latency = row["stats"]["total_tokens"], row["token_latency"]
        for name, value in (
            ("rollouts", 1),
            ("total", total),
            ("latency", latency),
            ("acceleration", 1 - latency / total if total else 0.0),
            ("activated", row["forks"] > 0),
            ("forks", row["forks"]),
            ("threads", row["forked_threads"]),
            ("well_formed", row["format_ok"]),
            ("seconds", row["seconds"]),
            (row["status"], 1),
        ):
            sums[name] += float(value)
    local = torch.tensor([*sums.values(), float(retried)], dtype=torch.float64, device=accelerator.device)
    *values, again = accelerator.reduce(local, reduction="sum").tolist()
    sums = dict(zip(sums, values, strict=True))
    count = sums["rollouts"]
    return {
        "rollout/token_latency": sums["latency"] / count,
        "rollout/total_tokens": sums["total"] / count,
        "rollout/acceleration": sums["acceleration"] / count,
        "rollout/activation_ratio": sums["activated"] / count,
        "rollout/threads_per_block": sums["threads"] / sums["forks"] if sums["forks"] else 0.0,
        "rollout/format_correctness": sums["well_formed"] / count,
        "rollout/seconds": sums["seconds"] / count,
        "rollout/retried": again,
        **{f"rollout/{status}": sums[status] / count for status in STATUSES},
    }


def write_rollouts(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a file of trajectories (`tw_recipes.rollout.read_trajectories`), replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
