"""What real servers answered, replayed: vLLM, SGLang, and two that cannot run fork/join decoding.

tests/engines/record.py records them; each file in tests/data/exchanges says how it came about.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from tests.engines.record import CONTEXT, FORCED, ask_all
from tests.support.rollouts import tagged_tokenizer
from tests.support.servers import EngineServer, ReplayServer
from tw_recipes.decoding import EngineError, OpenAIEngine, Request
from tw_recipes.decoding.openai_wire import LostReply, read_completion

FOLDER = Path(__file__).parents[2] / "data" / "exchanges"
STOPPED = Request(CONTEXT, (186, 256), 12)


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text())["exchanges"]


def completions(name):
    return [e for e in recorded(name) if e["path"].endswith("/completions")]


def replay(name):
    """The engine, its answers by name, and what it told while it streamed; every request must have been recorded."""
    told = []
    with ReplayServer(recorded(name)) as server:
        engine = OpenAIEngine(server.url, "model", tagged_tokenizer(), max_context=100_000, attempts=1)
        answers = ask_all(engine, told.extend)
        assert server.unknown == []
        assert sorted(server.used) == list(range(len(server.exchanges)))
    return engine, answers, told


@pytest.fixture(scope="module")
def vllm():
    return replay("vllm-0.32.0")


@pytest.fixture(scope="module")
def sglang():
    return replay("sglang-0.5.23")


@pytest.fixture(params=["vllm", "sglang"])
def either(request):
    return request.getfixturevalue(request.param)


def said(name):
    """What each call with a biased token says to have stopped it, by its last id."""
    field = {"vllm-0.32.0": "stop_reason", "sglang-0.5.23": "matched_stop"}[name]
    choices = [
        exchange["response"]["choices"][0]
        for exchange in completions(name)
        if exchange["request"].get("logit_bias") and exchange["request"]["max_tokens"] == 8
    ]
    assert all(choice["text"] == "" for choice in choices)  # the stop id is dropped from the text
    return {choice["token_ids"][-1]: choice[field] for choice in choices}


def test_both_pass_the_probe(vllm, sglang):
    ((one,), (other,)) = vllm[0].servers, sglang[0].servers
    assert (one.kind, one.max_context, one.logprobs_of) == ("vllm", 512, "model")
    assert (other.kind, other.max_context, other.logprobs_of) == ("sglang", 506, "sampled")


def test_both_give_the_same_greedy_ids_and_log_probs(vllm, sglang):
    first, second = vllm[1]["greedy"], sglang[1]["greedy"]
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_allclose(first.logprobs, second.logprobs, atol=1e-5)
    assert max(first.ids) >= len(tagged_tokenizer())  # rows without a token are sampled, and taken as they are


def test_ids_log_probs_and_streams(either):
    _, answers, told = either
    greedy = answers["greedy"]
    assert (len(greedy.ids), greedy.finish) == (8, "length")
    for other in (answers["again"], answers["streamed"]):
        np.testing.assert_array_equal(other.ids, greedy.ids)
        np.testing.assert_allclose(other.logprobs, greedy.logprobs, atol=1e-5)
    assert told == greedy.ids.tolist()
    assert len(answers["sampled"].ids) == 8
    assert answers["sampled"].ids.tolist() != greedy.ids.tolist()


def test_cached_tokens_are_whole_blocks_or_exact_and_never_the_last_one(vllm, sglang):
    assert (vllm[1]["greedy"].cached_tokens, vllm[1]["again"].cached_tokens) == (0, 32)
    assert (sglang[1]["greedy"].cached_tokens, sglang[1]["again"].cached_tokens) == (0, 63)


def test_the_end_is_read_from_the_last_id_whatever_the_server_says(either):
    engine, answers, _ = either
    assert answers["forced stop"].ids.tolist() == [FORCED]
    assert answers["end of sequence"].ids.tolist() == [engine.eos_ids[0]]
    assert answers["forced stop"].finish == answers["end of sequence"].finish == "stop"
    shows = answers["forced stop"].logprobs[0] > -1e-3
    assert shows == (engine.logprobs_of == "sampled")  # the bias that made it certain shows, or does not


def test_stop_reason_is_null_at_an_end_of_sequence_and_matched_stop_is_not(vllm, sglang):
    eos = vllm[0].eos_ids[0]
    assert said("vllm-0.32.0") == {FORCED: FORCED, eos: None}
    assert said("sglang-0.5.23") == {FORCED: FORCED, eos: eos}


def test_a_long_prompt_is_refused_and_a_long_completion_cut_or_refused(vllm, sglang):
    """Two forms of error body, two texts."""
    one, other = vllm[1], sglang[1]
    assert "refused the call: HTTP 400: This model's maximum context length is 512 tokens" in str(one["too long"])
    assert "it wrote 12 of 64 tokens and calls that the length" in str(one["clamped"])
    assert "refused the call: HTTP 400: The input (600 tokens) is longer than the model's" in str(other["too long"])
    assert "refused the call: HTTP 400: Requested token count exceeds the model's" in str(other["clamped"])


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


def stopped_reply():
    """A recorded reply of eight tokens, its last one declared a stop id."""
    asked = [e for e in completions("sglang-0.5.23") if e["request"]["prompt"] == CONTEXT.tolist()]
    reply = copy.deepcopy(asked[0]["response"])
    reply["choices"][0] |= {"finish_reason": "stop", "matched_stop": reply["choices"][0]["token_ids"][-1]}
    return reply


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
    one_logprob_less: "its counts do not add up: .*'logprobs': 7",
    one_id_less: "its counts do not add up",
    other_prompt: "prompt_token_ids differ from the prompt",
    usage_off_by_one: "its counts do not add up: .*'usage.completion_tokens': 9",
    prompt_cut: "its counts do not add up: .*'usage.prompt_tokens': 63",
    stop_id_left_out: "it stopped at id 186 and left this id out of token_ids",
    runs_on: r"wrote 1 tokens past the stop id 186",
    cut_short: "it wrote 7 of 12 tokens and calls that the length",
    filtered: "finish_reason must be stop or length, got 'content_filter'",
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_a_recorded_reply_with_one_thing_wrong_is_refused(change):
    reply = stopped_reply()
    assert read_completion(copy.deepcopy(reply), STOPPED).ids[-1] == 186
    change(reply["choices"][0], reply["usage"])
    with pytest.raises(EngineError, match=BROKEN[change]):
        read_completion(reply, STOPPED)


def test_a_taken_back_call_may_be_sent_again():
    reply = stopped_reply()
    reply["choices"][0]["finish_reason"] = "abort"
    with pytest.raises(LostReply, match="aborted"):
        read_completion(reply, STOPPED)


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}, {"something_new": 3}])
def test_a_server_that_does_not_count_cached_tokens(details):
    reply = stopped_reply()
    reply["usage"]["prompt_tokens_details"] = details
    assert read_completion(reply, STOPPED).cached_tokens is None
    del reply["usage"]["prompt_tokens_details"]
    assert read_completion(reply, STOPPED).cached_tokens is None


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
