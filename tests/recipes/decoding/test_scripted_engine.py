"""ScriptedEngine: lines are cut as an engine would cut them; exceptions, completions, latency, streaming."""

import asyncio
import time

import numpy as np
import pytest

from tw_recipes.decoding import Completion, EngineError, Request, ScriptedEngine


def ask(engine: ScriptedEngine, *stops: int, max_tokens: int = 9, **fields) -> Completion:
    return asyncio.run(engine.generate(Request(np.array([1]), stops or (8, 11), max_tokens, **fields)))


@pytest.mark.parametrize(
    ("line", "max_tokens", "ids", "finish"),
    [
        ([1, 8, 2], 9, [1, 8], "stop"),
        ([1, 2, 3], 9, [1, 2, 3], "length"),
        ([1, 2, 8], 3, [1, 2, 8], "stop"),
        ([1, 2, 8], 2, [1, 2], "length"),
        ([], 9, [], "length"),
        (np.array([11, 8]), 9, [11], "stop"),
    ],
)
def test_a_line_is_cut_after_the_first_stop_id_or_at_max_tokens(line, max_tokens, ids, finish):
    answer = ask(ScriptedEngine([line], [11]), max_tokens=max_tokens)
    assert (answer.ids.tolist(), answer.finish) == (ids, finish)


def test_past_its_end_a_script_ends_sequences():
    engine = ScriptedEngine([[1, 8]], [11, 12])
    assert [ask(engine).ids.tolist() for _ in range(3)] == [[1, 8], [11], [11]]
    assert len(engine.requests) == 3


def test_exceptions_are_raised_and_completions_are_given_untouched():
    odd = Completion(np.array([8, 8, 8]))
    engine = ScriptedEngine([EngineError("gone"), odd], [11])
    with pytest.raises(EngineError, match="gone"):
        ask(engine)
    assert ask(engine) is odd


def test_a_function_answers_by_the_request_and_logprobs_and_tokens_are_given():
    engine = ScriptedEngine(lambda request: [request.max_tokens, 8], [11], logprob=-0.5, max_context=7)
    seen: list[list[int]] = []
    answer = ask(engine, max_tokens=4, on_tokens=seen.append)
    assert answer.ids.tolist() == [4, 8]
    assert answer.logprobs.tolist() == [-0.5, -0.5]
    assert seen == [[4, 8]]
    assert engine.max_context == 7
    asyncio.run(engine.aclose())


def test_latency_is_per_call_and_per_token():
    engine = ScriptedEngine([[1, 2, 3, 8]], [11], latency=(0.02, 0.01))
    began = time.perf_counter()
    ask(engine)
    assert time.perf_counter() - began >= 0.06
