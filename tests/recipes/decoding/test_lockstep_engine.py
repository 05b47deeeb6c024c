"""LockstepEngine: the tokens of one call do not depend on the others, and log-probs are the model's."""

import asyncio

import numpy as np
import pytest
import torch

from tests.support.models import tiny_model
from tw_recipes import install
from tw_recipes.decoding.engine import GREEDY, EngineError, Request, Sampling, check_completion
from tw_recipes.decoding.lockstep_engine import LockstepEngine

CONTEXTS = [np.arange(3, 3 + length) for length in (2, 9, 5, 5, 1)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


def requests(sampling: Sampling, stops: tuple[int, ...] = (2,), most: int = 12) -> list[Request]:
    return [Request(context, stops, most, sampling, seed=place) for place, context in enumerate(CONTEXTS)]


def run(engine: LockstepEngine, wanted: list[Request]) -> list[list[int]]:
    async def all_at_once():
        return await asyncio.gather(*(engine.generate(request) for request in wanted))

    found = asyncio.run(all_at_once())
    for request, completion in zip(wanted, found, strict=True):
        check_completion(request, completion)
    return found


@pytest.mark.parametrize("family", ["qwen3", "mistral_window", "gpt_oss_sinks"])
def test_greedy_equals_generate(family):
    model = tiny_model(family)
    found = run(LockstepEngine(model, eos_ids=[2]), requests(GREEDY))
    for context, completion in zip(CONTEXTS, found, strict=True):
        ids = torch.from_numpy(context)[None]
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert completion.ids.tolist() == wanted[0, len(context) :].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9, 20, seed=1), Sampling(seed=1)], ids=str)
def test_a_call_does_not_depend_on_its_neighbours(model, sampling):
    wanted = requests(sampling)
    together = run(LockstepEngine(model, eos_ids=[2]), wanted)
    cut = run(LockstepEngine(model, eos_ids=[2], max_batch=2), wanted)
    alone = [run(LockstepEngine(model, eos_ids=[2]), [request])[0] for request in wanted]
    for one, two, three in zip(together, cut, alone, strict=True):
        assert one.ids.tolist() == two.ids.tolist() == three.ids.tolist()
        np.testing.assert_allclose(one.logprobs, three.logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_those_of_the_distribution_that_was_sampled(model, temperature):
    wanted = requests(Sampling(temperature))
    for request, completion in zip(wanted, run(LockstepEngine(model, eos_ids=[2]), wanted), strict=True):
        ids = torch.from_numpy(np.concatenate([request.context, completion.ids]))[None]
        logits = model(ids).logits[0, len(request.context) - 1 : -1] / temperature
        own = logits.log_softmax(-1).gather(1, ids[0, len(request.context) :, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, own.detach().numpy(), atol=1e-5)


def test_frequencies_follow_the_distribution(model):
    """2,000 first tokens of one context: no probability is off by more than five standard deviations."""
    sampling, count = Sampling(seed=0), 2000
    wanted = [Request(CONTEXTS[1], (2,), 1, sampling, seed=place) for place in range(count)]
    drawn = np.bincount([int(c.ids[0]) for c in run(LockstepEngine(model, eos_ids=[2]), wanted)], minlength=97) / count
    p = model(torch.from_numpy(CONTEXTS[1])[None]).logits[0, -1].softmax(-1).detach().numpy()
    assert np.all(np.abs(drawn - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1 / count)


def test_stop_ids_end_a_call_and_stay(model):
    first = run(LockstepEngine(model, eos_ids=[2]), requests(GREEDY))[0].ids.tolist()
    stop = first[3]
    completion = run(LockstepEngine(model, eos_ids=[2]), requests(GREEDY, stops=(2, stop)))[0]
    assert (completion.ids.tolist(), completion.finish) == (first[: first.index(stop) + 1], "stop")
    short = run(LockstepEngine(model, eos_ids=[2]), requests(GREEDY, most=2))[0]
    assert (short.ids.tolist(), short.finish) == (first[:2], "length")


def test_under_trie_attention_the_model_is_given_back_as_it_was(model):
    stock = run(LockstepEngine(model, eos_ids=[2]), requests(GREEDY))
    trained = install(tiny_model("qwen3")).train()
    name = trained.config._attn_implementation
    found = run(LockstepEngine(trained, eos_ids=[2]), requests(GREEDY))
    assert [c.ids.tolist() for c in found] == [c.ids.tolist() for c in stock]
    assert (trained.training, trained.config._attn_implementation) == (True, name)


def test_a_failing_forward_is_an_engine_error_of_every_call(model, monkeypatch):
    engine = LockstepEngine(model, eos_ids=[2])

    def broken(*args, **kwargs):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)

        async def failing():
            return await asyncio.gather(*(engine.generate(r) for r in requests(GREEDY)), return_exceptions=True)

        errors = asyncio.run(failing())
    assert {str(error) for error in errors} == {"generation failed: RuntimeError: no memory"}
    assert all(isinstance(error, EngineError) for error in errors)
    assert len(run(engine, requests(GREEDY))) == len(CONTEXTS)


def test_what_it_cannot_do_is_refused(model):
    engine = LockstepEngine(model, eos_ids=[2], max_context=10)
    with pytest.raises(EngineError, match=r"ids must lie in 0..96, got 3..97"):
        asyncio.run(engine.generate(Request(np.array([3, 97]), (2,), 1)))
    with pytest.raises(EngineError, match=r"must fit 10 tokens, got 9 \+ 2"):
        asyncio.run(engine.generate(Request(np.arange(9), (2,), 2)))
    with pytest.raises(ValueError, match="logit_bias is not possible with LockstepEngine"):
        asyncio.run(engine.generate(Request(np.arange(3), (2,), 2, Sampling(logit_bias={1: 1.0}))))
    with pytest.raises(ValueError, match="eos_ids must not be empty"):
        LockstepEngine(model, eos_ids=[])
