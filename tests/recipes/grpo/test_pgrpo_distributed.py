"""Two processes on gloo with different numbers of units, one with failed rollouts: SPEC section 6, in float64."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests.support.grpo import GROUP, train
from tests.support.pgrpo import (
    TEXTS,
    exact_head,
    failing,
    finished_units,
    formula_gradients,
    pgrpo_trainer,
    policy,
    scripted,
)
from tests.support.processes import leave_together
from tw_recipes.rollout import read_trajectories


def choose(key: str) -> str:
    """Rank 0 forks much, rank 1 little."""
    rank, place = (int(part) for part in key.split("/")[0].split("."))
    return TEXTS[place % 4] if rank == 0 else TEXTS[1] if place % 2 else "\\boxed{9}" * (1 + place)


def _worker(rank: int, directory: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for case, options in {
        "plain": {"engine": scripted(choose)},
        "failed": {"engine": scripted(failing(choose, [1, 3] if rank else [])), "rollout_retries": 0},
    }.items():
        trainer = pgrpo_trainer(
            f"{directory}/{case}",
            model=policy(torch.float64),
            per_device_train_batch_size=GROUP // 2,
            gradient_accumulation_steps=2,
            max_steps=1,
            log_rollouts=-1,
            **options,
        )
        assert trainer.accelerator.num_processes == 2
        exact_head(trainer.model)
        steps, logs = train(trainer)
        if rank == 0:
            torch.save({"gradients": steps[0], "logs": logs[0]}, f"{directory}/{case}.pt")
    leave_together()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, args=(str(directory), port), nprocs=2)
    return directory


def reward_of(text: str) -> float:
    return ("7}" in text) * (1.125 if "<Parallel>" in text else 1.0)


@pytest.mark.parametrize(("case", "lost"), [("plain", set()), ("failed", {(1, 1), (1, 3)})])
def test_two_ranks_equal_the_formula(two_processes, case, lost):
    groups = []
    for rank in range(2):
        rows = list(read_trajectories(two_processes / case / "rollouts" / f"step-000000-rank{rank}.jsonl"))
        assert [row["status"] == "error" for row in rows] == [(rank, place) in lost for place in range(GROUP)]
        texts = [choose(f"{rank}.{place}") for place in range(GROUP) if (rank, place) not in lost]
        prompt = rows[0]["prompt"]
        assert {row["prompt"] for row in rows} == {prompt}
        groups.append([(finished_units(prompt, text), reward_of(text)) for text in texts])
    wanted = formula_gradients(policy(torch.float64), groups)
    found = torch.load(two_processes / f"{case}.pt")
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    names = {name.removeprefix("module."): gradient for name, gradient in found["gradients"].items()}
    errors = {name: float((names[name] - gradient).abs().max()) / scale for name, gradient in wanted.items()}
    assert max(errors.values()) < 1e-9
    assert found["logs"]["rollout/error"] == len(lost) / 8
    assert found["logs"]["rollout/activation_ratio"] == 3 / 8
