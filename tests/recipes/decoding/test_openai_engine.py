"""OpenAIEngine on a scripted server: what is sent, what is checked, where calls go, what the probe says."""

import asyncio
import logging

import numpy as np
import pytest

from tests.support.rollouts import FORKED
from tw_core import TagIds
from tw_recipes import OpenAIEngine
from tw_recipes.decoding import Completion, EngineError, ForkJoinDecoder, Request, Sampling

CONTEXT = np.arange(20, 60)


def engine_of(server, tokenizer, **options):
    urls = [one.url for one in server] if isinstance(server, list) else server.url
    options.setdefault("backoff_s", 0.01)
    options.setdefault("max_backoff_s", 0.1)
    return OpenAIEngine(urls, "model", tokenizer, **options)


def ask(engine, request) -> Completion:
    async def once():
        try:
            return await engine.generate(request)
        finally:
            await engine.aclose()

    return asyncio.run(once())


def decoder_of(engine, tokenizer, **options):
    return ForkJoinDecoder(engine, TagIds.from_tokenizer(tokenizer), **options)


def prompts(tokenizer, count):
    return [tokenizer.encode(f"What is {n}?") for n in range(count)]


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_fork_join_trajectories_over_http(serve, tokenizer, dialect):
    engine = engine_of(serve(dialect=dialect), tokenizer)
    rollouts = decoder_of(engine, tokenizer).decode_all(prompts(tokenizer, 20))
    assert {rollout.text(tokenizer) for rollout in rollouts} == {FORKED + tokenizer.eos_token}
    assert all(rollout.complete for rollout in rollouts)
    assert engine.logprobs_of == {"vllm": "model", "sglang": "sampled"}[dialect]
    assert engine.max_context == {"vllm": 4096, "sglang": 4090}[dialect]  # what SGLang keeps back
    one = rollouts[0]
    assert [len(values) for values in one.logprobs] == [len(unit.completion) for unit in one.units]
    assert {call.replica for call in one.calls} == {engine.servers[0].name}


def test_the_share_of_cached_context_is_counted_from_usage(serve, tokenizer):
    engine = engine_of(serve(), tokenizer)
    (rollout,) = decoder_of(engine, tokenizer).decode_all(prompts(tokenizer, 1))
    cached = [call.cached_tokens for call in rollout.calls]
    assert cached[0] == 0
    assert all(16 <= tokens < len(call.context) for tokens, call in zip(cached[1:], rollout.calls[1:], strict=True))
    assert rollout.cached_share == sum(cached) / sum(len(call.context) for call in rollout.calls)
    assert engine.cached_share == rollout.cached_share


def test_every_sampling_field_is_sent(serve, tokenizer):
    """A server takes what is missing from the model's generation_config.json (top_k=20, a repetition penalty, …)."""
    server = serve(lambda request: [7] * 3)
    engine = engine_of(server, tokenizer, cache_salt="policy-0")
    sampling = Sampling(0.7, 0.9, 5, logit_bias={3: -100.0})
    ask(engine, Request(CONTEXT, (tokenizer.eos_token_id,), 3, sampling, key="a", seed=11))
    assert server.calls[-1] == {
        "model": "model",
        "prompt": CONTEXT.tolist(),
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [tokenizer.eos_token_id],
        "return_token_ids": True,
        "logprobs": 1,
        "seed": 11,
        "logit_bias": {"3": -100.0},
        "cache_salt": "policy-0",
    }
    engine.cache_salt = None
    ask(engine, Request(CONTEXT, (tokenizer.eos_token_id,), 3))
    assert server.calls[-1]["top_k"] == -1
    assert not {"seed", "logit_bias", "cache_salt"} & set(server.calls[-1])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(np.array([5, 270]), (1,), 4), r"context must hold ids in 0..269, got 5..270"),
        (Request(np.array([-1, 5]), (1,), 4), r"context must hold ids in 0..269, got -1..5"),
        (Request(CONTEXT, (1, 999), 4), r"stop_ids must hold ids in 0..269, got 1..999"),
        (Request(CONTEXT, (1,), 4, Sampling(logit_bias={300: 1.0})), r"logit_bias must hold ids in 0..269"),
        (Request(np.arange(0), (1,), 4), r"needs a context and max_tokens >= 1, got 0 context tokens"),
        (Request(CONTEXT, (1,), 0), r"got 40 context tokens and max_tokens=0"),
        (Request(CONTEXT, (1,), 61), r"must fit 100 tokens, got 40 \+ 61"),
    ],
)
def test_ids_and_lengths_are_checked_before_sending(serve, tokenizer, request_, message):
    """One of these ends an SGLang server, others are cut or ignored without a word."""
    server = serve(max_context=100)
    engine = engine_of(server, tokenizer)
    sent = len(server.calls)
    with pytest.raises(EngineError, match=message):
        ask(engine, request_)
    assert len(server.calls) == sent


def test_ids_that_the_engine_wrote_may_be_sent_back(serve, tokenizer):
    """A padded output matrix has rows without a token; servers sample them, and they are contexts of later calls."""
    engine = engine_of(serve(lambda request: [300, 7]), tokenizer)
    written = ask(engine, Request(CONTEXT, (), 2)).ids
    assert written.tolist() == [300, 7]
    assert ask(engine, Request(written, (), 2)).ids.tolist() == [300, 7]
    with pytest.raises(EngineError, match=r"ids in 0..300, got 301..301"):
        ask(engine, Request(np.array([301]), (), 2))


def test_an_over_long_prompt_is_a_trajectory_with_its_reason(serve, tokenizer):
    engine = engine_of(serve(max_context=64), tokenizer)
    short, long = decoder_of(engine, tokenizer).decode_all([np.arange(10), np.arange(64)])
    assert (long.status, len(long.calls)) == ("error", 0)
    assert "the prompt has 64 tokens and the engine's context 64" in long.reason
    assert short.status == "length"
    assert len(short.ids) <= 64 + 4  # closers of the cut response come on top


def test_tokens_stream_and_add_up_to_the_completion(serve, tokenizer):
    engine, parts = engine_of(serve(), tokenizer), []
    request = Request(CONTEXT, (tokenizer.eos_token_id,), 500, on_tokens=parts.append)
    streamed, whole = ask(engine, request), ask(engine, Request(CONTEXT, (tokenizer.eos_token_id,), 500))
    assert len(parts) > 3
    assert [token for part in parts for token in part] == streamed.ids.tolist()
    np.testing.assert_array_equal(streamed.ids, whole.ids)
    np.testing.assert_array_equal(streamed.logprobs, whole.logprobs)
    assert streamed.finish == whole.finish == "stop"
    assert (streamed.cached_tokens, whole.cached_tokens) == (0, 32)


def test_all_calls_of_a_trajectory_go_to_one_replica(serve, tokenizer):
    servers = [serve() for _ in range(3)]
    engine = engine_of(servers, tokenizer)
    rollouts = decoder_of(engine, tokenizer).decode_all(prompts(tokenizer, 30))
    homes = [{call.replica for call in rollout.calls} for rollout in rollouts]
    assert all(len(home) == 1 for home in homes)
    assert {name for home in homes for name in home} == {server.name for server in servers}
    assert sum(len(server.calls) for server in servers) == 3 * 3 + 30 * 4  # three probes, four calls a trajectory
    assert all(rollout.cached_share > 0.3 for rollout in rollouts)


def test_a_dead_replica_loses_its_trajectories_to_the_others(serve, tokenizer):
    servers = [serve() for _ in range(3)]
    engine = engine_of(servers, tokenizer)
    before = decoder_of(engine, tokenizer).decode_all(prompts(tokenizer, 30))
    servers[0].kill()
    after = decoder_of(engine, tokenizer).decode_all(prompts(tokenizer, 30))
    assert all(rollout.complete for rollout in after)
    for old, new in zip(before, after, strict=True):
        home, now = old.calls[0].replica, {call.replica for call in new.calls}
        assert servers[0].name not in now
        assert len(now) == 1
        assert now == {home} or home == servers[0].name


def test_the_key_comes_from_the_environment_and_is_never_logged(serve, tokenizer, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    caplog.set_level(logging.DEBUG)
    server = serve()
    engine = engine_of(server, tokenizer, attempts=2)
    server.fault = lambda number, body: "500"
    with pytest.raises(EngineError) as refused:
        ask(engine, Request(CONTEXT, (1,), 4))
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-very-secret"}
    assert "secret" not in caplog.text + str(refused.value) + repr(vars(engine))
    monkeypatch.delenv("OPENAI_API_KEY")
    server.fault = lambda number, body: ""
    engine_of(server, tokenizer)
    assert server.headers[-1]["authorization"] == "Bearer none"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_ids", r"cannot run fork/join decoding: its replies have no token_ids .*\(it ignores return_token_ids\)"),
        ("past_stop", r"it ignores stop_token_ids \(it wrote 4 tokens where the first one was a stop id\)"),
        ("500", r"it refuses a prompt of token ids \(HTTP 500: no luck: 500\); it refuses return_token_ids"),
    ],
)
def test_the_probe_says_what_is_missing(serve, tokenizer, fault, message):
    server = serve()
    server.fault = lambda number, body: fault
    with pytest.raises(EngineError, match=message):
        engine_of(server, tokenizer)


def test_the_probe_says_which_model_is_served_and_who_does_not_answer(serve, tokenizer):
    server = serve(model="other")
    with pytest.raises(EngineError, match=r"does not serve 'model'; it serves \['other'\]"):
        engine_of(server, tokenizer)
    with pytest.raises(EngineError, match=r"does not answer GET .*/v2/models \(HTTP 404: no route /v2/models\)"):
        OpenAIEngine(server.url.replace("v1", "v2"), "other", tokenizer)
    server.kill()
    with pytest.raises(EngineError, match=r"127.0.0.1:\d+ does not answer GET .*connection failed"):
        OpenAIEngine(server.url, "other", tokenizer)


def test_replicas_that_tell_log_probs_of_another_kind_are_refused(serve, tokenizer):
    with pytest.raises(EngineError, match="log-probs differ in kind"):
        engine_of([serve(), serve(dialect="sglang")], tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, "attempts must be >= 1, got 0"),
        ({"timeout_s": 0}, "timeout_s and backoff_s must be > 0"),
        ({"backoff_s": 2.0, "max_backoff_s": 1.0}, "max_backoff_s >= backoff_s, got 1800.0, 2.0 and 1.0"),
        ({"eos_ids": ()}, "eos_ids must hold at least one id"),
    ],
)
def test_bad_options_are_refused(serve, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(serve(), tokenizer, **options)


def test_a_server_that_hides_its_context_needs_max_context(serve, tokenizer):
    server = serve(max_context=None)
    with pytest.raises(ValueError, match="max_context must be given"):
        engine_of(server, tokenizer)
    assert engine_of(server, tokenizer, max_context=77).max_context == 77


def test_ends_of_sequence_come_from_the_generation_config_too(serve, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert engine_of(serve(), loaded).eos_ids == (tokenizer.eos_token_id, 5, 9)
    assert engine_of(serve(), tokenizer).eos_ids == (tokenizer.eos_token_id,)
