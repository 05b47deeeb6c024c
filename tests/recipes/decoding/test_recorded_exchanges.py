"""What real servers answered, replayed: vLLM, SGLang, and two that cannot run fork/join decoding.

tests/engines/record.py records them; each file in tests/data/exchanges says how it came about.
"""

import asyncio
import copy
import json
from pathlib import Path

import numpy as np
import pytest

from tests.engines.record import CONTEXT, FORCED, ask_all
from tests.support.rollouts import tagged_tokenizer
from tests.support.servers import EngineServer, ReplayServer
from tw_recipes.decoding import EngineError, OpenAIEngine, Request
from tw_recipes.decoding.openai_probe import Server
from tw_recipes.decoding.openai_wire import LostReply, read_completion

FOLDER = Path(__file__).parents[2] / "data" / "exchanges"
SGLANG = Request(np.arange(10, 18), (182,), 8)


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text())["exchanges"]


def completions(name):
    return [e for e in recorded(name) if e["path"].endswith("/completions")]


@pytest.fixture(scope="module")
def vllm():
    """The engine, its answers by name, and what it told while it streamed; every request must have been recorded."""
    told = []
    with ReplayServer(recorded("vllm-0.32.0")) as server:
        engine = OpenAIEngine(server.url, "model", tagged_tokenizer(), max_context=100_000, attempts=1)
        answers = ask_all(engine, told.extend)
        assert server.unknown == []
        assert sorted(server.used) == list(range(len(server.exchanges)))
    return engine, answers, told


def test_vllm_passes_the_probe(vllm):
    (server,) = vllm[0].servers
    assert (server.kind, server.max_context, server.logprobs_of) == ("vllm", 512, "model")


def test_vllm_ids_log_probs_and_cached_blocks(vllm):
    _, answers, told = vllm
    greedy, again, streamed = answers["greedy"], answers["again"], answers["streamed"]
    assert (len(greedy.ids), greedy.finish) == (8, "length")
    assert max(greedy.ids) > len(tagged_tokenizer())  # rows without a token are sampled, and taken as they are
    for other in (again, streamed):
        np.testing.assert_array_equal(other.ids, greedy.ids)
        np.testing.assert_array_equal(other.logprobs, greedy.logprobs)
    assert told == greedy.ids.tolist()
    assert (greedy.cached_tokens, again.cached_tokens) == (0, 32)  # blocks of 32, never the last token
    assert answers["sampled"].ids.tolist() != greedy.ids.tolist()


def test_vllm_says_stop_reason_null_at_an_end_of_sequence(vllm):
    """The end is read from the last id: stop_reason alone would call this one a length."""
    engine, answers, _ = vllm
    assert answers["forced stop"].ids.tolist() == [FORCED]
    assert answers["end of sequence"].ids.tolist() == [engine.eos_ids[0]]
    assert answers["forced stop"].finish == answers["end of sequence"].finish == "stop"
    assert answers["forced stop"].logprobs[0] < -1  # raw: the bias that made it certain does not show
    reasons = {
        exchange["response"]["choices"][0]["token_ids"][-1]: exchange["response"]["choices"][0]["stop_reason"]
        for exchange in completions("vllm-0.32.0")
        if exchange["request"].get("logit_bias") and exchange["request"]["max_tokens"] == 8
    }
    assert reasons == {FORCED: FORCED, engine.eos_ids[0]: None}


def test_vllm_refuses_a_long_prompt_and_cuts_a_long_completion(vllm):
    _, answers, _ = vllm
    assert "refused the call: HTTP 400: This model's maximum context length is 512 tokens" in str(answers["too long"])
    assert "it wrote 12 of 64 tokens and calls that the length" in str(answers["clamped"])


@pytest.fixture
def sglang(monkeypatch):
    monkeypatch.setattr(OpenAIEngine, "_probe", lambda self: [Server("sglang", "sglang", 100_000, "sampled")])
    with ReplayServer(recorded("sglang-0.5.23")) as server:
        yield OpenAIEngine(server.url, "tiny", tagged_tokenizer(), attempts=1)
        assert server.unknown == []


def ask(engine, request):
    async def run():
        try:
            return await engine.generate(request)
        finally:
            await engine.aclose()

    return asyncio.run(run())


def test_sglang_says_matched_stop_and_counts_cached_tokens_exactly(sglang):
    done = ask(sglang, SGLANG)
    assert (done.ids.tolist(), done.finish, done.cached_tokens) == ([68, 273, 182], "stop", 7)
    np.testing.assert_allclose(done.logprobs, [-1.64747, -2.09809, -2.52557])


def test_sglang_has_another_form_of_error(sglang):
    with pytest.raises(EngineError, match="refused the call: HTTP 400: Requested token count exceeds"):
        ask(sglang, Request(np.full(600, 20), (), 8))


@pytest.mark.parametrize(
    ("name", "model", "parts"),
    [
        (
            "transformers-serve-5.19.0",
            "random",
            [
                "it refuses a prompt of token ids (HTTP 400: {'detail': 'prompt must be a string.'})",
                "it refuses return_token_ids (HTTP 422",
                "it refuses stop_token_ids (HTTP 422",
            ],
        ),
        (
            "llama-cpp-server",
            "tiny",
            [
                "its replies have no token_ids and prompt_token_ids (it ignores return_token_ids)",
                "its replies have no logprobs.token_logprobs",
                "it ignores stop_token_ids (it wrote 4 tokens where the first one was a stop id)",
            ],
        ),
    ],
)
def test_servers_that_cannot_do_it_fail_at_the_probe_with_all_that_is_missing(name, model, parts):
    with ReplayServer(recorded(name)) as server, pytest.raises(EngineError) as refused:
        OpenAIEngine(server.url, model, tagged_tokenizer())
    assert server.unknown == []
    assert str(refused.value).startswith(f"{server.name} cannot run fork/join decoding: ")
    assert all(part in str(refused.value) for part in parts)
    assert "vLLM and SGLang can" in str(refused.value)


def no_ids(choice, usage):
    choice["token_ids"] = None


def no_prompt_ids(choice, usage):
    del choice["prompt_token_ids"]


def no_logprobs(choice, usage):
    choice["logprobs"] = None


def one_logprob_less(choice, usage):
    choice["logprobs"]["token_logprobs"].pop()


def one_id_less(choice, usage):
    choice["token_ids"].pop(0)


def other_prompt(choice, usage):
    choice["prompt_token_ids"] = [*choice["prompt_token_ids"][:-1], 3]


def usage_off_by_one(choice, usage):
    usage["completion_tokens"] += 1


def prompt_cut(choice, usage):
    usage["prompt_tokens"] -= 1


def stop_id_left_out(choice, usage):
    choice["token_ids"].pop()
    choice["logprobs"]["token_logprobs"].pop()
    usage["completion_tokens"] -= 1


def runs_on(choice, usage):
    choice["token_ids"].append(5)
    choice["logprobs"]["token_logprobs"].append(-1.0)
    usage["completion_tokens"] += 1


def cut_short(choice, usage):
    stop_id_left_out(choice, usage)
    choice["finish_reason"] = "length"


def filtered(choice, usage):
    choice["finish_reason"] = "content_filter"


BROKEN = {
    no_ids: "its reply has no token_ids and prompt_token_ids",
    no_prompt_ids: "its reply has no token_ids and prompt_token_ids",
    no_logprobs: "its reply lacks logprobs.token_logprobs",
    one_logprob_less: "its counts do not add up: .*'logprobs': 2",
    one_id_less: "its counts do not add up",
    other_prompt: "prompt_token_ids differ from the prompt",
    usage_off_by_one: "its counts do not add up: .*'usage.completion_tokens': 4",
    prompt_cut: "its counts do not add up: .*'usage.prompt_tokens': 7",
    stop_id_left_out: "it stopped at id 182 and left this id out of token_ids",
    runs_on: r"wrote 1 tokens past the stop id 182",
    cut_short: "it wrote 2 of 8 tokens and calls that the length",
    filtered: "finish_reason must be stop or length, got 'content_filter'",
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_a_recorded_reply_with_one_thing_wrong_is_refused(change):
    reply = copy.deepcopy(completions("sglang-0.5.23")[0]["response"])
    assert read_completion(copy.deepcopy(reply), SGLANG).ids.tolist() == [68, 273, 182]
    change(reply["choices"][0], reply["usage"])
    with pytest.raises(EngineError, match=BROKEN[change]):
        read_completion(reply, SGLANG)


def test_a_taken_back_call_may_be_sent_again():
    reply = copy.deepcopy(completions("sglang-0.5.23")[0]["response"])
    reply["choices"][0]["finish_reason"] = "abort"
    with pytest.raises(LostReply, match="aborted"):
        read_completion(reply, SGLANG)


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}, {"something_new": 3}])
def test_a_server_that_does_not_count_cached_tokens(details):
    reply = copy.deepcopy(completions("sglang-0.5.23")[0]["response"])
    reply["usage"]["prompt_tokens_details"] = details
    assert read_completion(reply, SGLANG).cached_tokens is None
    del reply["usage"]["prompt_tokens_details"]
    assert read_completion(reply, SGLANG).cached_tokens is None


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_the_scripted_server_of_other_tests_speaks_like_the_recorded_one(dialect):
    name = {"vllm": "vllm-0.32.0", "sglang": "sglang-0.5.23"}[dialect]
    real = next(e for e in completions(name) if e["status"] == 200 and isinstance(e["response"], dict))["response"]
    body = {"prompt": CONTEXT.tolist(), "max_tokens": 2, "temperature": 0.0, "top_p": 1.0, "top_k": -1}
    with EngineServer(lambda request: [5, 6, 7], dialect=dialect) as server:
        fake = server.answer("POST", "/v1/completions", body | {"stop_token_ids": [9]})
    spoken = json.loads(fake.body)
    assert set(spoken) <= set(real)
    assert set(spoken["usage"]) <= set(real["usage"])
    assert set(spoken["choices"][0]) <= set(real["choices"][0])
    assert set(spoken["choices"][0]["logprobs"]) <= set(real["choices"][0]["logprobs"])
