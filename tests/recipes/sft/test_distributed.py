"""Two processes on gloo, DDP through the trainer and FSDP2 by hand, equal one stock process on the expanded units."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.models import tiny_model
from tests.support.processes import leave_together
from tests.support.sft import logged, parameters, stock_trainer, trajectories, trie_trainer
from tests.support.tries import largest_error

SAMPLES = trajectories(24, 3, seed=4)
STEPS = 5
PER_STEP = 4  # samples of one optimizer step: 2 ranks x 2 micro-batches


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ddp(directory: str) -> None:
    trainer = trie_trainer(tiny_model("qwen3"), SAMPLES, directory, gradient_accumulation_steps=2, max_steps=STEPS)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.accelerator.is_main_process:
        found = {"parameters": parameters(trainer.model)}
        found |= {name: logged(trainer, name) for name in ("loss", "grad_norm", "num_tokens")}
        torch.save(found, f"{directory}/ddp.pt")


def _fsdp2(directory: str, rank: int) -> None:
    trainer = trie_trainer(tiny_model("gemma3"), SAMPLES, directory, gradient_checkpointing=True)
    model = trainer.model.train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.gradient_checkpointing_enable()
    assert isinstance(model.lm_head.weight, DTensor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rows = [trainer.data_collator([row]) for row in trainer.train_dataset]
    for step in range(STEPS):
        batches = rows[step * PER_STEP : (step + 1) * PER_STEP]
        items = torch.tensor(sum(batch["labels"].numel() for batch in batches))
        for batch in batches[rank::2]:
            trainer.compute_loss(model, dict(batch), num_items_in_batch=items).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(whole, f"{directory}/fsdp2.pt")


def _worker(rank: int, directory: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    _ddp(directory)
    _fsdp2(directory, rank)
    leave_together()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(_worker, args=(str(directory), _free_port()), nprocs=2)
    return directory


def _stock(family, directory, **options):
    trainer = stock_trainer(
        tiny_model(family), SAMPLES, directory, gradient_accumulation_steps=PER_STEP, max_steps=STEPS, **options
    )
    trainer.train()
    return trainer


def test_ddp_equals_one_stock_process(two_processes, tmp_path):
    stock, found = _stock("qwen3", tmp_path), torch.load(two_processes / "ddp.pt")
    assert largest_error(found["parameters"], parameters(stock.model)) < 1e-5
    for name in ("loss", "grad_norm", "num_tokens"):
        assert found[name] == pytest.approx(logged(stock, name), rel=1e-5), name


def test_fsdp2_equals_one_stock_process(two_processes, tmp_path):
    stock = _stock("gemma3", tmp_path)
    assert largest_error(torch.load(two_processes / "fsdp2.pt"), parameters(stock.model)) < 1e-5
