"""A rollout as one row: its trie in preorder, the response's end last, generated tokens alone trained."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings

from tests.recipes.decoding.test_decoder_properties import EOS as STOP
from tests.recipes.decoding.test_decoder_properties import played
from tests.support.pgrpo import TEXTS, failing, scripted, tokenizer
from tw_core import ReasoningTrie, TagIds
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.decoding.engine import EngineError
from tw_recipes.decoding.rollout import Rollout
from tw_recipes.decoding.scripted_engine import ScriptedEngine
from tw_recipes.grpo.rollouts import RolloutRow, rollout_row

EOS = int(tokenizer().eos_token_id)
PROMPT = tokenizer().encode("2+5?", add_special_tokens=False)


def decode(engine: ScriptedEngine) -> Rollout:
    decoder = ForkJoinDecoder(engine, TagIds.from_tokenizer(tokenizer()))
    return asyncio.run(decoder.decode(PROMPT, "0.0"))


def paths(row: RolloutRow) -> dict[int, list[int]]:
    """Tokens from the prompt's end to each row."""
    found: dict[int, list[int]] = {}
    for place, (token, parent) in enumerate(zip(row.completion_ids, row.parents, strict=True)):
        assert parent < place
        found[place] = [*found.get(parent, []), token]
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_the_row_is_the_trie_of_the_units(text):
    rollout = decode(scripted(lambda key: text, logprob=-0.5))
    row = rollout_row(rollout, [EOS])
    trie = ReasoningTrie.from_units(rollout.units)
    assert len(row.completion_ids) == trie.num_tokens - len(PROMPT)
    assert sum(row.mask) == rollout.generated_tokens == int(trie.weights.sum())
    found = paths(row)
    # Each generated token is scored exactly once, in the context in which it was drawn.
    scored = sorted(found[place] for place, trained in enumerate(row.mask) if trained)
    drawn = []
    for context, completion in rollout.units:
        seen = context.tolist()[len(PROMPT) :]
        drawn += [[*seen, *completion[: k + 1].tolist()] for k in range(len(completion))]
    assert scored == sorted(drawn)
    # The last row ends the joined response, whose rows are one path.
    assert row.completion_ids[-1] == EOS
    assert found[len(row.completion_ids) - 1] == rollout.response_ids.tolist()
    assert row.logprobs == [-0.5 * trained for trained in row.mask]


def test_log_probs_stand_at_the_tokens_they_belong_to():
    """A log-prob that names its token and its depth is found at that token."""
    engine = scripted(lambda key: TEXTS[2])
    generate = engine.generate

    async def with_logprobs(request):
        answer = await generate(request)
        object.__setattr__(
            answer, "logprobs", -(answer.ids + 1000.0 * (len(request.context) + np.arange(len(answer.ids))))
        )
        return answer

    engine.generate = with_logprobs
    row = rollout_row(decode(engine), [EOS])
    depth = [len(path) - 1 + len(PROMPT) for path in paths(row).values()]
    assert row.logprobs == [
        -(token + 1000.0 * at) * trained for token, at, trained in zip(row.completion_ids, depth, row.mask, strict=True)
    ]


def test_a_response_of_one_token_and_one_without_any():
    empty = decode(ScriptedEngine([[EOS]], [EOS]))
    assert rollout_row(empty, [EOS]) == RolloutRow([EOS], [-1], [1], None)
    lost = decode(scripted(failing(lambda key: "", [0])))
    assert (lost.status, lost.units) == ("error", [])
    assert rollout_row(lost, [EOS]) == RolloutRow([EOS], [-1], [0], [0.0])


def test_a_thread_that_ended_in_eos_is_no_finished_response():
    """Its unit keeps the id; were it the last row, TRL would count the rollout as finished."""
    text = TEXTS[0]
    ids = scripted(lambda key: text)
    calls = iter(range(100))

    async def generate(request):
        number = next(calls)
        if number == 3:
            raise EngineError("lost at the join")
        if number == 0:
            return await type(ids).generate(ids, request)
        return await type(ids).generate(ScriptedEngine([[40 + number, EOS]], [EOS]), request)

    engine = ScriptedEngine([], [EOS])
    engine.generate = generate
    rollout = decode(engine)
    assert not rollout.ok
    assert sum(int(unit.completion[-1]) == EOS for unit in rollout.units) == 2
    row = rollout_row(rollout, [EOS])
    assert row.completion_ids[-1] != EOS
    assert sum(row.mask) == rollout.generated_tokens


@settings(max_examples=100, deadline=None)
@given(rollout=played())
def test_laws_of_rows(rollout):
    """Any engine, any failure, any limits: see tests/recipes/decoding/test_decoder_properties.py."""
    row = rollout_row(rollout, [STOP])
    found = paths(row)
    scored = sorted(found[place] for place, trained in enumerate(row.mask) if trained)
    drawn = []
    for context, completion in rollout.units:
        seen = context.tolist()[rollout.prompt_length :]
        drawn += [[*seen, *completion[: k + 1].tolist()] for k in range(len(completion))]
    assert scored == sorted(drawn)
    assert len(set(map(tuple, found.values()))) == len(found)  # a trie: no path stands twice
    if rollout.units:
        assert (row.completion_ids[-1] == STOP) == rollout.ok
        if rollout.complete:
            assert found[len(found) - 1] == rollout.response_ids.tolist()
    if rollout.logprobs is not None and rollout.units:
        assert row.logprobs == [-1.0 * trained for trained in row.mask]
