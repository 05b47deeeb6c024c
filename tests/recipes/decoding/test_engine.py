"""What every engine's answer must be: `check_completion`; sampling options; seeds that are the same everywhere."""

import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from tw_recipes.decoding import GREEDY, Completion, Engine, EngineError, Request, Sampling, ScriptedEngine
from tw_recipes.decoding.engine import check_completion, is_any, stable_seed

REQUEST = Request(np.array([5, 6]), (8, 11), 3)


def completion(*ids: int, **fields) -> Completion:
    return Completion(np.array(ids, dtype=np.int64), **fields)


def test_an_answer_that_can_be_one_is_returned_as_it_is():
    for answer in (completion(1, 2, 8), completion(1, finish="length")):
        assert check_completion(REQUEST, answer) is answer


@pytest.mark.parametrize(
    ("ids", "said", "is_a"), [((1, 2, 8), "length", "stop"), ((8,), "length", "stop"), ((), "stop", "length")]
)
def test_the_last_id_says_why_a_call_ended(ids, said, is_a):
    """At the last allowed token some engines say "length" beside a stop id."""
    assert check_completion(REQUEST, completion(*ids, finish=said)).finish == is_a


def test_ids_of_any_integer_kind_become_int64():
    for ids in ([1, 8], (1, 8), np.array([1, 8], dtype=np.int32)):
        found = check_completion(REQUEST, Completion(ids)).ids
        assert found.dtype == np.int64
        assert found.tolist() == [1, 8]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completion(1, 2, 3, 4, finish="length"), "wrote 4 tokens where max_tokens=3"),
        (completion(1, 8, 2, finish="length"), "wrote 1 tokens past the stop id 8: it ignores stop ids; use a server"),
        (completion(1, 2), r"stopped at id 2, which is none of the stop ids \[8, 11\]; .* add it to eos_ids"),
        (completion(1, 8, logprobs=np.array([-1.0])), "gave 1 log-probs for 2 tokens"),
        (completion(1, 8, logprobs=np.array([-1.0, np.nan])), "log-probs that are no finite numbers"),
        (completion(1, 8, logprobs=np.array([-np.inf, 0.0])), "log-probs that are no finite numbers"),
        (completion(1, -8, finish="length"), "gave no token ids: ids must not be negative"),
        (Completion(np.array([1.0, 8.0])), "gave no token ids: ids must hold integers"),
        (Completion(np.array([[1, 8]])), r"gave no token ids: ids must have shape \(L,\)"),
    ],
)
def test_an_answer_that_cannot_be_one_is_an_error_with_the_reason(answer, message):
    with pytest.raises(EngineError, match=message):
        check_completion(REQUEST, answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be >= 0 \(0 is greedy\), got -0.1"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0; use 1 to keep every token"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"top_k": -1}, r"top_k must be >= 0 \(0 keeps every token\), got -1"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_greedy_is_temperature_0():
    assert GREEDY.greedy
    assert not Sampling().greedy
    assert hash(Sampling(logit_bias={1: 2.0})) == hash(Sampling(logit_bias={2: 1.0}))
    assert Sampling(logit_bias={1: 2.0}) != Sampling(logit_bias={2: 1.0})


def test_seeds_are_the_same_in_every_process_and_differ_by_every_part():
    parts = (7, "key", ((0, "1"),), 12)
    code = f"from tw_recipes.decoding.engine import stable_seed; print(stable_seed(*{parts!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(other) == stable_seed(*parts)
    assert len({stable_seed(seed, key, end) for seed in range(9) for key in "abc" for end in range(99)}) == 9 * 3 * 99
    assert 0 <= stable_seed(*parts) < 2**31


@given(st.lists(st.integers(0, 9), max_size=9), st.lists(st.integers(0, 9), max_size=4))
def test_is_any_is_isin(ids, wanted):
    array = np.array(ids, dtype=np.int64)
    assert is_any(array, wanted).tolist() == np.isin(array, wanted).tolist()


def test_what_has_the_protocol_is_an_engine():
    assert isinstance(ScriptedEngine([], [11]), Engine)
    assert not isinstance(object(), Engine)
