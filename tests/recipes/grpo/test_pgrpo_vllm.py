"""vLLM as TRL keeps it, by a stand-in: weights first, ids in, ids and log-probs out, asleep while training."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.grpo import GROUP, train
from tests.support.pgrpo import by_place, pgrpo_trainer, policy, scripted, tokenizer
from tw_recipes.decoding.engine import Request
from tw_recipes.grpo.pgrpo_trainer import RolloutError

EOS = int(tokenizer().eos_token_id)


class StandIn:
    """TRL's VLLMGeneration without vLLM; `events` says what happened in which order."""

    def __init__(self, mode: str, **_: Any) -> None:
        self.events: list[str] = []
        self.enable_sleep_mode = self._llm_weights_sleeping = mode == "colocate"
        self.params: list[Any] = []
        self.llm = SimpleNamespace(
            generate=self.generate,
            wake_up=lambda tags: self.events.append(f"wake {tags[0]}"),
            sleep=lambda level: self.events.append(f"sleep {level}"),
            llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=1000)),
        )
        # What TRL asks a server when it starts.
        info = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info)

    def sync_weights(self) -> None:
        self.events.append("weights")
        self._llm_weights_sleeping = False

    def generate(self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        """Ends every response at once."""
        self.events.append(f"generate {len(prompts)}")
        self.params += sampling_params
        output = SimpleNamespace(token_ids=[EOS], logprobs=[{EOS: SimpleNamespace(logprob=-5.0)}])
        return [SimpleNamespace(outputs=[output])] * len(prompts)


@pytest.fixture
def vllm(monkeypatch):
    """The module, and TRL's class."""
    module = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StandIn)


@pytest.mark.usefixtures("vllm")
def test_colocated_vllm_sleeps_while_training(tmp_path):
    trainer = pgrpo_trainer(tmp_path, engine="model", use_vllm=True, vllm_mode="colocate", max_steps=2)
    _, logged = train(trainer)
    batch = ["weights", "wake kv_cache", f"generate {2 * GROUP}", "sleep 2"]
    assert trainer.vllm_generation.events == 2 * batch
    params = trainer.vllm_generation.params[0]
    assert (params.n, params.logprobs, params.max_tokens, params.temperature) == (1, 0, 300, 1.0)
    assert tokenizer().convert_tokens_to_ids("</Outlines>") in params.stop_token_ids
    assert logged[0]["rollout/done"] == 1
    assert logged[0]["sampling/importance_sampling_ratio/max"] > 0


@pytest.mark.usefixtures("vllm")
def test_weights_that_sleep_dropped_are_pushed_again(tmp_path):
    """TRL pushes once a step; an evaluation in the same step finds an empty vLLM."""
    trainer = pgrpo_trainer(tmp_path, engine="model", use_vllm=True, vllm_mode="colocate", max_steps=1)
    engine = trainer.source.engine
    request = Request(np.arange(3), (EOS,), 4)

    async def one() -> None:
        await engine.generate(request)
        await engine.aclose()

    asyncio.run(one())
    asyncio.run(one())
    assert trainer.vllm_generation.events == 2 * ["weights", "wake kv_cache", "generate 1", "sleep 2"]


@pytest.mark.usefixtures("vllm")
def test_the_server_is_synchronised_before_each_batch(tmp_path, monkeypatch):
    made = []

    def server(urls: str, name: str, tokenizer: Any, eos_ids: Any) -> Any:
        made.append((urls, name))
        return scripted(by_place, logprob=-5.5)

    monkeypatch.setattr("tw_recipes.decoding.openai_engine.OpenAIEngine", server)
    model = policy()
    model.config._name_or_path = "tiny"
    trainer = pgrpo_trainer(
        tmp_path,
        model=model,
        engine="model",
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://localhost:1/",
        max_steps=2,
    )
    _, logged = train(trainer)
    assert made == [("http://localhost:1/v1", "tiny")]
    assert trainer.vllm_generation.events == ["weights", "weights"]
    # One update a batch: the correction is that of the engine's log-probs against the trie's.
    assert 0 < logged[0]["sampling/sampling_logp_difference/mean"] < 1
    assert logged[0]["rollout/activation_ratio"] == 0.75


@pytest.mark.usefixtures("vllm")
def test_a_correction_without_log_probs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tw_recipes.decoding.openai_engine.OpenAIEngine", lambda *_, **__: scripted(by_place))
    trainer = pgrpo_trainer(tmp_path, engine="model", use_vllm=True, vllm_mode="server", max_steps=1)
    with pytest.raises(RolloutError, match="no log-probs, which vllm_importance_sampling_correction needs"):
        train(trainer)
