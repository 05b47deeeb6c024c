"""Fixed steps: the same tokens and log-probs as steps that grow, across growth of the buffers and rows that leave."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from tests.recipes.decoding.test_lockstep_engine import CONTEXTS, run
from tests.support.models import tiny_model
from tw_recipes import _compat
from tw_recipes.decoding import fixed_step
from tw_recipes.decoding.engine import GREEDY, Request, Sampling
from tw_recipes.decoding.fixed_step import ROOM, FixedStep, FixedSteps
from tw_recipes.decoding.lockstep_engine import LockstepEngine


class Counted(FixedSteps):
    """Fixed steps with little room, and how many batches used them."""

    made: list[FixedStep]

    def __init__(self, model):
        super().__init__(model, room=4)

    def begin(self, *args):
        self.made.append(super().begin(*args))
        return self.made[-1]


@pytest.fixture
def fixed(monkeypatch):
    """Fixed steps on this machine too."""
    monkeypatch.setattr(Counted, "made", [], raising=False)
    monkeypatch.setattr(fixed_step, "fits", lambda model: True)
    monkeypatch.setattr("tw_recipes.decoding.lockstep_engine.FixedSteps", Counted)
    return Counted.made


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9, 20, seed=1)], ids=str)
def test_tokens_and_log_probs_are_those_of_growing_steps(fixed, sampling):
    model = tiny_model("qwen3")
    # Rows that end at different steps: some leave alone, which keeps the shapes, some by half of the batch.
    requests = [
        Request(c, (2,), most, sampling, seed=most) for c, most in zip(CONTEXTS, (3, 30, 7, 1, 12), strict=True)
    ]
    wanted = run(LockstepEngine(model, eos_ids=[2], cuda_graphs=False), requests)
    assert not fixed
    engine = LockstepEngine(model, eos_ids=[2])
    for again in range(2):  # the second time in buffers that the first has left
        found = run(engine, requests)
        assert len(fixed) == again + 1
        assert fixed[again].length > 9 + 4
        for one, two in zip(found, wanted, strict=True):
            assert one.ids.tolist() == two.ids.tolist()
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-5)


def begin(steps, model, rows=1):
    ids = torch.arange(3, 9, device=model.device)[None].expand(rows, -1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, use_cache=True, **{_compat.cache_argument(model): cache})
    return steps.begin(cache, torch.ones_like(ids), ids.new_full((rows, 1), ids.shape[1]))


def end(step):
    step.keep(torch.tensor([], dtype=torch.int64))


def test_buffers_are_kept_until_something_else_would_be_computed():
    model = tiny_model("qwen3")
    steps = FixedSteps(model)
    first = begin(steps, model, rows=3)
    end(first)
    second = begin(steps, model, rows=4)
    assert second.at is first.at
    assert second.at.shape == (4, ROOM)
    end(second)
    handle = model.model.register_forward_hook(lambda *_: None)
    third = begin(steps, model, rows=4)
    handle.remove()
    assert third.at is not first.at
    end(third)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert begin(steps, model, rows=4).at is not third.at


def test_what_is_kept_is_bounded():
    model = tiny_model("qwen3")
    size = begin(FixedSteps(model), model).at.nbytes
    steps = FixedSteps(model, kept_bytes=2 * size)
    one, two = begin(steps, model), begin(steps, model, rows=2)
    end(one)
    end(two)
    assert begin(steps, model, rows=2).at is two.at
    assert begin(steps, model).at is not one.at  # the oldest had to go


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
def test_adapters_can_change_unseen_so_nothing_is_kept():
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(target_modules=["q_proj"])).get_base_model()
    steps = FixedSteps(model)
    one = begin(steps, model)
    end(one)
    assert begin(steps, model).at is not one.at


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
    wanted = run(LockstepEngine(model, eos_ids=[2], max_context=400, cuda_graphs=False), requests)
    engine = LockstepEngine(model, eos_ids=[2], max_context=400)
    for _ in range(2):  # captured, then replayed from the first step on
        for one, two in zip(run(engine, requests), wanted, strict=True):
            assert one.ids.tolist() == two.ids.tolist()
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so():
    model = tiny_model("qwen3").cuda()
    handle = model.register_forward_hook(lambda *_: torch.ones(1, device="cuda").item() and None)  # waits: no capture
    step, stream = begin(FixedSteps(model), model), torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="without CUDA graphs: Qwen3ForCausalLM"), torch.no_grad():
        found = step(torch.tensor([5], device="cuda"))
    handle.remove()
    assert torch.cuda.current_stream() == stream
    assert 0 <= torch.rand(1, device="cuda").item() < 1  # the generator is not left in capture
    with torch.no_grad():
        wanted = model(torch.tensor([[*range(3, 9), 5]], device="cuda")).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
