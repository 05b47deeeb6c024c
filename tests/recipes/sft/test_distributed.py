"""Two processes on gloo: ten steps, DDP through the trainer and FSDP2 by hand, equal one stock process on the units."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.models import tiny_model
from tests.support.processes import leave_together
from tests.support.sft import byte_tokenizer, logged, parameters, stock_trainer, trajectories, trie_trainer
from tests.support.tries import largest_error, packed_loss
from tw_core.tags import TAGS
from tw_recipes import add_tag_tokens, install, uninstall
from tw_recipes.attention import is_installed
from tw_recipes.tokens import TagTokenError

STEPS = 10
PER_STEP = 4  # samples of one optimizer step: 2 ranks x 2 micro-batches
SAMPLES = trajectories(STEPS * PER_STEP, 3, seed=4)


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


def _wrapped(directory: str, rank: int) -> None:
    """`install` on models that are wrapped already, and tags in a sharded embedding that has room for them."""
    units = SAMPLES[0]
    plain = install(tiny_model("qwen3"))
    expected = packed_loss(plain, units)
    replicated = install(DistributedDataParallel(tiny_model("qwen3")))
    sharded = tiny_model("qwen3")
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    install(sharded)
    found = {"expected": expected, "ddp": packed_loss(replicated, units), "fsdp2": packed_loss(sharded, units)}
    uninstall(replicated)
    found["uninstalled"] = not is_installed(replicated.module)
    embedding, tokenizer = tiny_model("qwen3", vocab_size=272, tie_word_embeddings=False), byte_tokenizer()
    before = [matrix.weight.detach().clone() for matrix in (embedding.model.embed_tokens, embedding.lm_head)]
    fully_shard(embedding)
    found["ids"] = add_tag_tokens(embedding, tokenizer)
    matrices = embedding.model.embed_tokens.weight, embedding.lm_head.weight
    assert all(isinstance(matrix, DTensor) for matrix in matrices)
    found["rows"] = [(old, new.full_tensor()) for old, new in zip(before, matrices, strict=True)]
    with pytest.raises(TagTokenError, match="cannot grow an FSDP-sharded model; call it before sharding"):
        add_tag_tokens(fully_shard(tiny_model("qwen3", vocab_size=262)), byte_tokenizer())
    if rank == 0:
        torch.save(found, f"{directory}/wrapped.pt")


def _worker(rank: int, directory: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    _ddp(directory)
    _fsdp2(directory, rank)
    _wrapped(directory, rank)
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


def test_install_reaches_the_model_inside_ddp_and_fsdp2(two_processes):
    found = torch.load(two_processes / "wrapped.pt")
    for wrapper in ("ddp", "fsdp2"):
        assert found[wrapper].item() == pytest.approx(found["expected"].item(), rel=1e-5)
    assert found["uninstalled"]


def test_tags_get_their_rows_in_a_sharded_embedding_and_head(two_processes):
    found = torch.load(two_processes / "wrapped.pt")
    for before, after in found["rows"]:
        expected = before.clone()
        for tag, index in zip(TAGS, found["ids"], strict=True):
            pieces = byte_tokenizer()(tag[1:-1], add_special_tokens=False)["input_ids"]
            expected[index] = before[pieces].mean(dim=0)
        torch.testing.assert_close(after, expected)
