"""Fixed steps: the same tokens and log-probs as steps that grow, across growth of the buffers and rows that leave."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.support.models import tiny_model
from tw_recipes.decoding import fixed_step
from tw_recipes.decoding.engine import GREEDY, Request, Sampling
from tw_recipes.decoding.fixed_step import FixedStep
from tw_recipes.decoding.lockstep_engine import LockstepEngine

CONTEXTS = [np.arange(3, 3 + length) for length in (2, 9, 5, 5, 1)]


def run(engine, requests):
    async def all_at_once():
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(all_at_once())


@pytest.fixture
def fixed(monkeypatch):
    """Fixed steps on this machine too, and how many batches used them."""
    made = []

    class Counted(FixedStep):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args, room=4)

    monkeypatch.setattr(fixed_step, "fits", lambda model: True)
    monkeypatch.setattr("tw_recipes.decoding.lockstep_engine.FixedStep", Counted)
    return made


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9, 20, seed=1)], ids=str)
def test_tokens_and_log_probs_are_those_of_growing_steps(fixed, sampling):
    model = tiny_model("qwen3")
    # Rows that end at different steps: some leave alone, which keeps the shapes, some by half of the batch.
    requests = [Request(c, (2,), most, sampling, seed=most) for c, most in zip(CONTEXTS, (3, 30, 7, 1, 12), strict=True)]
    wanted = run(LockstepEngine(model, eos_ids=[2], cuda_graphs=False), requests)
    assert not fixed
    found = run(LockstepEngine(model, eos_ids=[2]), requests)
    assert len(fixed) == 1 and fixed[0].length > 9 + 4
    for one, two in zip(found, wanted, strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-5)


def test_layers_with_a_window_run_without(fixed):
    model = tiny_model("mistral_window")
    requests = [Request(context, (2,), 12, GREEDY) for context in CONTEXTS]
    found = run(LockstepEngine(model, eos_ids=[2]), requests)
    wanted = run(LockstepEngine(model, eos_ids=[2], cuda_graphs=False), requests)
    assert not fixed
    assert [one.ids.tolist() for one in found] == [two.ids.tolist() for two in wanted]


def test_fits_names_a_gpu_and_sdpa():
    assert not fixed_step.fits(tiny_model("qwen3"))


@pytest.mark.gpu
def test_replayed_steps_are_the_steps():
    model = tiny_model("qwen3").cuda()
    requests = [Request(context, (2,), 300, Sampling(seed=1), seed=place) for place, context in enumerate(CONTEXTS)]
    wanted = run(LockstepEngine(model, eos_ids=[2], cuda_graphs=False), requests)
    found = run(LockstepEngine(model, eos_ids=[2]), requests)
    for one, two in zip(found, wanted, strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so():
    model = tiny_model("qwen3").cuda()
    ids = torch.arange(3, 9, device="cuda")[None]
    cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    with torch.no_grad():
        first = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
        step = FixedStep(model, cache, mask, ids.new_full((1, 1), ids.shape[1]))
        handle = model.register_forward_hook(lambda *_: torch.ones(1, device="cuda").item())  # waits for the device
        try:
            with pytest.warns(UserWarning, match="without CUDA graphs: Qwen3ForCausalLM"):
                found = step(first)
        finally:
            handle.remove()
        wanted = model(torch.cat([ids, first[:, None]], 1)).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
