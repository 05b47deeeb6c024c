"""A real server against the same model in this process: ids, log-probs, stops, caches, limits, load.

`make test-engines` runs it on vLLM; with REAL_SERVER_URL and REAL_SERVER_MODEL it runs on any server, e.g. SGLang.
"""

import asyncio
from uuid import uuid4

import numpy as np
import pytest

from tests.engines.forced import Forced
from tw_core import Unit
from tw_recipes import OpenAIEngine
from tw_recipes.decoding import EngineError, Limits, Request, Sampling

TOLERANCE = 1e-5
"""From the exact log-probs: those of the same weights in float64."""


def ask(engine, *requests, together=True):
    """The completions (or errors) of requests, at once or one after another."""

    async def run():
        try:
            if together:
                return await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)
            return [await engine.generate(request) for request in requests]
        finally:
            await engine.aclose()

    return asyncio.run(run())


def same_ids(first, second):
    return [np.array_equal(a.ids, b.ids) for a, b in zip(first, second, strict=True)]


def test_greedy_trajectories_equal_those_in_process(bench):
    """The trained model forks by itself; ids equal to the last one, log-probs are within 1e-5 of the exact ones."""
    remote, local = bench.remote(), bench.local()
    there, here = bench.decode(remote, bench.prompts), bench.decode(local, bench.prompts)
    assert all(same_ids(there, here))
    assert bench.missed(there).max() < TOLERANCE
    assert bench.missed(here).max() < TOLERANCE
    if bench.case.folder.name == "trained":
        assert all(one.stats.num_threads >= 2 for one in there)
        assert sum(one.complete for one in there) > len(there) // 2
        assert remote.cached_share > 0.3


def test_forced_forks_equal_those_in_process(bench):
    remote = Forced(bench.remote(), bench.case.text, bench.tokenizer, bias=True)
    local = Forced(bench.local(), bench.case.text, bench.tokenizer, bias=False)
    there, here = bench.decode(remote, bench.prompts[:6]), bench.decode(local, bench.prompts[:6])
    assert all(same_ids(there, here))
    for one in there:
        assert one.stats.num_blocks >= 1
        assert [call.kind for call in one.calls].count("thread") >= 2
        for call, values in zip(one.written, bench.exact_logprobs(one.units), strict=True):
            free = np.array(remote.free[call.context.tobytes()])
            if remote.inner.logprobs_of == "model":  # raw: the bias that forced a token does not show
                free[:] = True
            assert np.abs(call.logprobs - values)[free].max(initial=0.0) < TOLERANCE


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_log_probs_equal_those_of_the_trie(bench, temperature):
    """To 1e-5, but for a few tokens in contexts that the trained model has not seen and only temperature 1 writes.

    They are so badly conditioned that any float32 pass misses them by more, ours of the trie as often as the server's:
    rounding the norms alone to float32 does.
    """
    engine = bench.remote()
    rollouts = bench.decode(engine, bench.prompts[:8], Sampling(temperature, seed=3))
    missed = bench.missed(rollouts, 1.0 if engine.logprobs_of == "model" else temperature)
    assert len(missed) > 500
    if temperature == 1.0 and bench.case.folder.name == "trained":
        assert np.mean(missed < TOLERANCE) > 0.997
        assert missed.max() < 5 * TOLERANCE
    else:
        assert missed.max() < TOLERANCE


def test_log_probs_are_of_what_the_engine_says(bench):
    """At temperature 0.5 a server tells the model's log-probs (vLLM) or those it sampled from (SGLang)."""
    engine, context = bench.remote(), np.array(bench.prompts[0])
    (done,) = ask(engine, Request(context, (bench.eos,), 12, Sampling(0.5, seed=1), seed=1))
    unit = Unit(context, done.ids)
    (raw,), (scaled,) = bench.exact_logprobs([unit]), bench.exact_logprobs([unit], 0.5)
    told, other = (raw, scaled) if engine.logprobs_of == "model" else (scaled, raw)
    assert np.abs(done.logprobs - told).max() < TOLERANCE < np.abs(done.logprobs - other).max()


def test_stop_ids_and_lengths(bench):
    engine, context = bench.remote(), np.array(bench.prompts[0])
    (free,) = ask(engine, Request(context, (), 12))
    assert (len(free.ids), free.finish) == (12, "length") or free.ids[-1] == bench.eos
    stop = int(free.ids[3])
    first = free.ids.tolist().index(stop)
    stopped, forced, ended, one = ask(
        engine,
        Request(context, (stop, bench.eos), 12),
        Request(context, (7, bench.eos), 12, Sampling(0.0, logit_bias={7: 100.0})),
        Request(context, (bench.eos,), 12, Sampling(0.0, logit_bias={bench.eos: 100.0})),
        Request(context, (bench.eos,), 1),
    )
    assert stopped.ids.tolist() == free.ids[: first + 1].tolist()
    assert len(stopped.logprobs) == first + 1
    assert (forced.ids.tolist(), forced.finish) == ([7], "stop")
    assert (ended.ids.tolist(), ended.finish) == ([bench.eos], "stop")
    assert one.ids.tolist() == free.ids[:1].tolist()


def test_streamed_tokens_are_those_of_the_completion(bench):
    engine, context, parts = bench.remote(), np.array(bench.prompts[1]), []
    request = Request(context, (bench.eos,), 40)
    whole, streamed = ask(engine, request, Request(context, (bench.eos,), 40, on_tokens=parts.append), together=False)
    assert [token for part in parts for token in part] == streamed.ids.tolist() == whole.ids.tolist()
    assert np.abs(streamed.logprobs - whole.logprobs).max() < TOLERANCE
    assert len(parts) > 1


def test_cached_prefixes_are_counted_and_salts_keep_them_apart(bench):
    """vLLM counts whole blocks of 32, SGLang tokens; neither counts the last token of a prompt."""
    rng = np.random.default_rng(bench.eos)
    context = rng.choice(bench.prompts[0], 130)
    longer = np.concatenate([context, context[:20]])
    engine = bench.remote(cache_salt=f"policy-0-{uuid4()}")
    new, again, more = ask(
        engine, *(Request(ids, (bench.eos,), 1) for ids in (context, context, longer)), together=False
    )
    assert new.cached_tokens == 0
    assert 128 <= again.cached_tokens < 130
    assert 128 <= more.cached_tokens <= 130
    engine.cache_salt = f"policy-1-{uuid4()}"
    (other,) = ask(engine, Request(context, (bench.eos,), 1))
    assert other.cached_tokens == 0
    assert engine.cached_tokens == again.cached_tokens + more.cached_tokens


def test_threads_find_the_prefix_in_the_cache(bench):
    """At a fork everything before the headers is there already, in whole blocks at least."""
    engine = Forced(bench.remote(cache_salt=str(uuid4())), bench.case.text, bench.tokenizer, bias=False)
    (one,) = bench.decode(engine, [bench.prompts[2] * 3])
    threads = [call for call in one.calls if call.kind == "thread"]
    assert len(threads) >= 2
    assert one.cached_share is None  # the wrapper's completions carry no usage; the engine below counts
    assert engine.inner.cached_share > 0.2


def test_two_hundred_trajectories_at_once(bench):
    """Twenty prompts ten times each, all in flight: every one is there, and greedy means all ten are equal."""
    prompts = bench.prompts * 10
    limits = Limits(max_total_tokens=120)
    engine = bench.remote()
    many = bench.decode(engine, prompts, limits=limits, max_calls=1024)
    few = bench.decode(bench.local(), bench.prompts, limits=limits)
    assert len(many) == 200
    assert all(same_ids(many, few * 10))
    assert all(one.status in ("done", "length") for one in many)
    assert all(not call.error for one in many for call in one.calls)


def test_over_long_prompts_are_refused_here_and_the_server_stays(bench):
    engine = bench.remote()
    filler = bench.prompts[0][0]
    long, edge, fine = bench.decode(
        engine, [[filler] * engine.max_context, [filler] * (engine.max_context - 3), bench.prompts[0]]
    )
    assert (long.status, long.calls) == ("error", ())
    assert f"the prompt has {engine.max_context} tokens" in long.reason
    assert edge.status in ("done", "length")
    assert edge.generated_tokens <= 3
    assert fine.status in ("done", "length")


def test_what_the_server_itself_says_to_a_call_that_is_too_long(bench):
    """With a wrong max_context: a refusal is passed on with its words, a silent cut is an error."""
    engine = bench.remote(max_context=100_000)
    filler = bench.prompts[0][0]
    long, cut = ask(
        engine,
        Request(np.full(600, filler), (), 8),
        Request(np.full(500, filler), (), 64, Sampling(0.0, logit_bias={bench.eos: -100.0})),
    )
    assert isinstance(long, EngineError)
    assert isinstance(cut, EngineError)
    assert "refused the call: HTTP 400: " in str(long)
    assert "512" in str(long)
    assert "it has less room than max_context says" in str(cut) or "refused the call: HTTP 400" in str(cut)
    assert not isinstance(ask(engine, Request(np.array(bench.prompts[0]), (bench.eos,), 4))[0], EngineError)


def test_an_unknown_model_is_named(bench):
    with pytest.raises(EngineError, match=r"does not serve 'other'; it serves \["):
        OpenAIEngine(bench.server.url, "other", bench.tokenizer)
