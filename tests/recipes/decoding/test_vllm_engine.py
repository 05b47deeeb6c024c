"""VLLMEngine on a stand-in for vLLM: what it is asked, sleep and waking, weights, cancellation, a clear ImportError.

tests/engines/test_colocated.py runs it on vLLM itself.
"""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tw_recipes.decoding import EngineError, Request, Sampling, VLLMEngine

CONTEXT = np.arange(5, 15)


class FakeLLM:
    """As much of AsyncLLM as the engine uses: writes 7, 8, 9 and the stop id, two tokens at a time."""

    def __init__(self, args):
        self.args, self.log, self.calls = args, [], []
        self.model_config = SimpleNamespace(
            max_model_len=100,
            try_get_generation_config=lambda: {"eos_token_id": [2, 3]},
            get_vocab_size=lambda: 50,
        )

    @classmethod
    def from_engine_args(cls, args):
        cls.made = cls(args)
        return cls.made

    async def generate(self, prompt, params, request_id):
        self.log.append("generate")
        self.calls.append((prompt, params))
        ids = [7, 8, 9, params["stop_token_ids"][0]][: params["max_tokens"]]
        for start in range(0, len(ids), 2):
            part = ids[start : start + 2]
            last = start + 2 >= len(ids)
            reason = ("stop" if len(ids) == 4 else "length") if last else None
            if params["seed"] == 666:
                reason = "abort"
            logprobs = [{token: SimpleNamespace(logprob=-token / 10)} for token in part]
            answer = SimpleNamespace(token_ids=part, logprobs=logprobs, finish_reason=reason)
            try:
                await asyncio.sleep(5 if params["seed"] == 99 else 0)
            except asyncio.CancelledError:
                self.log.append("aborted")
                raise
            yield SimpleNamespace(outputs=[answer], num_cached_tokens=4)

    async def sleep(self, level):
        self.log.append(f"sleep {level}")

    async def wake_up(self):
        self.log.append("wake")

    async def collective_rpc(self, method, kwargs):
        self.log.append((method, kwargs))

    async def reset_prefix_cache(self):
        self.log.append("reset")

    def shutdown(self):
        self.log.append("shutdown")


@pytest.fixture
def vllm(monkeypatch):
    module = {name: ModuleType(name) for name in ("vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.async_llm")}
    module["vllm.sampling_params"] = ModuleType("vllm.sampling_params")
    module["vllm"].AsyncEngineArgs = module["vllm"].SamplingParams = dict
    module["vllm.v1.engine.async_llm"].AsyncLLM = FakeLLM
    module["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(DELTA="delta")
    for name, fake in module.items():
        monkeypatch.setitem(sys.modules, name, fake)


@pytest.fixture
def engine(vllm):
    made = VLLMEngine("some/model", enable_sleep_mode=True, dtype="float32")
    yield made
    made.shutdown()


def test_a_call_and_what_vllm_is_asked(engine):
    told = []
    sampling = Sampling(0.5, 0.9, 3, logit_bias={4: -1.0})
    done = asyncio.run(engine.generate(Request(CONTEXT, (2, 11), 8, sampling, seed=5, on_tokens=told.append)))
    assert done.ids.tolist() == [7, 8, 9, 2]
    np.testing.assert_allclose(done.logprobs, [-0.7, -0.8, -0.9, -0.2])
    assert (done.finish, done.cached_tokens, told) == ("stop", 4, [[7, 8], [9, 2]])
    prompt, params = FakeLLM.made.calls[0]
    assert prompt == {"prompt_token_ids": CONTEXT.tolist()}
    assert params == {
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 5,
        "logit_bias": {4: -1.0},
        "stop_token_ids": [2, 11],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "output_kind": "delta",
    }
    assert FakeLLM.made.args["dtype"] == "float32"
    assert FakeLLM.made.args["skip_tokenizer_init"]
    assert (engine.eos_ids, engine.max_context, engine.vocab_size, engine.cached_share) == ((2, 3), 100, 50, 0.4)
    assert asyncio.run(engine.generate(Request(CONTEXT, (2,), 3))).finish == "length"


def test_what_a_listener_raises_reaches_the_caller(engine):
    """It was raised in a callback of the event loop, which logs it, and the call went on as if nothing had happened."""
    told = []

    def listener(ids):
        told.append(ids)
        raise RuntimeError("no display")

    with pytest.raises(RuntimeError, match="no display"):
        asyncio.run(engine.generate(Request(CONTEXT, (2,), 8, on_tokens=listener)))
    assert told == [[7, 8]]


def test_it_sleeps_between_rounds_and_takes_weights(engine):
    request = Request(CONTEXT, (2,), 8)

    async def rounds():
        await engine.generate(request)
        await engine.aclose()
        await engine.aclose()
        await engine.update_weights("out/step-1")
        await engine.generate(request)
        await engine.aclose()

    asyncio.run(rounds())
    assert FakeLLM.made.log == [
        *("generate", "sleep 1", "wake"),
        ("reload_weights", {"weights_path": "out/step-1"}),
        *("reset", "generate", "sleep 1"),
    ]


def test_without_sleep_mode_closing_changes_nothing(vllm):
    engine = VLLMEngine("some/model", eos_ids=[9])
    asyncio.run(engine.aclose())
    engine.shutdown()
    assert FakeLLM.made.log == ["shutdown"]
    assert engine.eos_ids == (9,)
    with pytest.raises(EngineError, match="was shut down; make another one"):
        asyncio.run(engine.generate(Request(CONTEXT, (2,), 8)))
    engine.shutdown()


def test_a_cancelled_call_is_cancelled_in_vllm(engine):
    async def run():
        task = asyncio.create_task(engine.generate(Request(CONTEXT, (2,), 8, seed=99)))
        while not FakeLLM.made.calls:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(60):  # vLLM hears of it in its own thread
            while "aborted" not in FakeLLM.made.log:
                await asyncio.sleep(0.001)
        return task.cancelled()

    assert asyncio.run(run())
    assert FakeLLM.made.log == ["generate", "aborted"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(np.array([5, 50]), (2,), 4), r"context ids must lie in 0..49, got 5..50"),
        (Request(CONTEXT, (2,), 91), r"must fit 100 tokens, got 10 \+ 91"),
        (Request(CONTEXT, (2,), 4, seed=666), "vLLM ended the call with 'abort'"),
    ],
)
def test_what_cannot_be_run_is_an_error(engine, request_, message):
    with pytest.raises(EngineError, match=message):
        asyncio.run(engine.generate(request_))


def test_without_an_end_of_sequence_nothing_starts(vllm, monkeypatch):
    made = FakeLLM.__init__

    def nameless(self, args):
        made(self, args)
        self.model_config.try_get_generation_config = dict

    monkeypatch.setattr(FakeLLM, "__init__", nameless)
    with pytest.raises(ValueError, match="the model names none; pass eos_ids"):
        VLLMEngine("some/model")
    assert FakeLLM.made.log == ["shutdown"]


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"needs vLLM.*pip install 'threadweaver\[serve\]', or use OpenAIEngine"):
        VLLMEngine("some/model")
