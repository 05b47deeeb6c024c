"""Two processes on gloo, DDP through the trainer and FSDP2 by hand, equal one process; ranks have uneven rollouts."""

import os
import socket
import warnings

import pytest
import torch
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.grpo import GROUP, PROMPTS, branching_rollouts, chain_rollouts, make_trainer, train
from tests.support.models import tiny_model
from tests.support.processes import leave_together
from tests.support.sft import BYTE_VOCAB, parameters
from tests.support.tries import largest_error
from tw_recipes.grpo import logps
from tw_recipes.grpo.layout import idle_forward

# A group has two completions on each rank in one case and is whole in the other; the budget cuts rank 0, whose
# prompts are longer, into more forwards than rank 1.
SPLIT = {"per_device_train_batch_size": GROUP // 2}
WHOLE = {"per_device_train_batch_size": GROUP}
UNEVEN = {"max_tokens_per_forward": 66, "shuffle_dataset": False, "verify_first_step": True}
LONG_FIRST = [PROMPTS[3], PROMPTS[2], PROMPTS[3] + " three,", "y"]
UPDATES = {"num_iterations": 2, "learning_rate": 3e-1, "epsilon": 0.02, "beta": 0.1}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train_and_save(trainer, path):
    """Gradients and metrics of the run, and how many forwards each rank ran only to keep step with the other."""
    idle = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logps, "idle_forward", lambda: idle.append(1) or idle_forward())
        gradients, metrics = train(trainer)
    idle = trainer.accelerator.gather(torch.tensor([len(idle)])).tolist()
    if trainer.accelerator.is_main_process:
        gradients = [{name.removeprefix("module."): g for name, g in step.items()} for step in gradients]
        torch.save({"gradients": gradients, "metrics": metrics, "idle": idle}, path)


def _ddp(directory: str) -> None:
    for name, rollouts, options in (
        ("chains_split", chain_rollouts, SPLIT | UNEVEN),
        ("chains_whole", chain_rollouts, WHOLE | UNEVEN | {"max_tokens_per_forward": 54}),
        ("branching", branching_rollouts, WHOLE | UNEVEN),
        ("graphs", branching_rollouts, WHOLE | UNEVEN | {"graph_rows": 1024}),
    ):
        trainer = make_trainer(
            "trie", f"{directory}/{name}", prompts=LONG_FIRST, rollout_func=rollouts, **options, **UPDATES
        )
        assert trainer.accelerator.num_processes == 2
        _train_and_save(trainer, f"{directory}/{name}.pt")


def _fsdp2(directory: str, rank: int) -> None:
    trainer = make_trainer(
        "trie",
        directory,
        model=tiny_model("gemma3", vocab_size=BYTE_VOCAB),
        prompts=LONG_FIRST,
        rollout_func=branching_rollouts,
        **WHOLE,
        **UNEVEN,
    )
    trainer.num_iterations, trainer.current_gradient_accumulation_steps = 2, 1
    model = trainer.model.train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(model.lm_head.weight, DTensor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    examples = [{"prompt": LONG_FIRST[rank]} for _ in range(GROUP)]
    for step in range(2):
        trainer._step = step
        inputs = trainer._prepare_inputs([dict(example) for example in examples])
        assert "old_per_token_logps" in inputs
        trainer.compute_loss(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(whole, f"{directory}/fsdp2.pt")


def _worker(rank: int, directory: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _ddp(directory)
    _fsdp2(directory, rank)
    leave_together()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(_worker, args=(str(directory), _free_port()), nprocs=2)
    return directory


@pytest.mark.parametrize(
    ("name", "kind", "rollouts", "size"),
    [
        ("chains_split", "stock", chain_rollouts, GROUP),
        ("chains_whole", "stock", chain_rollouts, 2 * GROUP),
        ("branching", "trie", branching_rollouts, 2 * GROUP),  # which equals its paths: test_logps.py
        ("graphs", "trie", branching_rollouts, 2 * GROUP),
    ],
)
def test_ddp_equals_one_process(two_processes, tmp_path, name, kind, rollouts, size):
    options = UPDATES | {"per_device_train_batch_size": size, "shuffle_dataset": False}
    one = make_trainer(kind, tmp_path, prompts=LONG_FIRST, rollout_func=rollouts, **options)
    gradients, metrics = train(one)
    found = torch.load(two_processes / f"{name}.pt")
    for ours, theirs in zip(found["gradients"], gradients, strict=True):
        assert largest_error(ours, theirs) < 1e-5
    for ours, theirs in zip(found["metrics"], metrics, strict=True):
        for metric in {metric for metric in theirs if not metric.endswith(("_time", "_second", "sharing_ratio"))}:
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=1e-5), metric
    assert found["metrics"][0]["verified_logp_difference"] < 1e-4
    if name != "chains_split":
        assert found["idle"][1] > found["idle"][0] == 0


def test_fsdp2_equals_one_process(two_processes, tmp_path):
    options = {"learning_rate": 0.3, "num_iterations": 2, "per_device_train_batch_size": 2 * GROUP}
    trainer = make_trainer(
        "trie",
        tmp_path,
        family="gemma3",
        prompts=LONG_FIRST,
        rollout_func=branching_rollouts,
        shuffle_dataset=False,
        **options,
    )
    train(trainer)
    assert largest_error(torch.load(two_processes / "fsdp2.pt"), parameters(trainer.model)) < 1e-5
