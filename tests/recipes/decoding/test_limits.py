"""Limits: refused values, and every limit that bites: what is written then, and how the result says so."""

import asyncio
from dataclasses import fields

import pytest

from tests.support.forking import EOS, OS_, P_, T_, block, outlines, thread
from tests.support.trajectories import NEWLINE, TAG_IDS
from tw_core import extract_units
from tw_core.scanner import id_tags, scan
from tw_recipes.decoding import GREEDY, ForkJoinDecoder, Limits, Rollout, ScriptedEngine

PROMPT = [100, 101]
FORK = outlines(1, 2)


def decode(script, max_context: int | None = None, **limits) -> Rollout:
    engine = ScriptedEngine(script, [EOS], max_context=max_context)
    return asyncio.run(ForkJoinDecoder(engine, TAG_IDS, Limits(**limits), GREEDY).decode(PROMPT))


def closed(rollout: Rollout) -> bool:
    tree = scan(id_tags(rollout.ids, TAG_IDS, rollout.prompt_length), rollout.prompt_length, len(rollout.ids))
    return all(span.closed for span in tree.walk())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_total_tokens": 0}, "max_total_tokens must be >= 1, got 0"),
        ({"max_thread_tokens": 0}, "max_thread_tokens must be >= 1, got 0"),
        ({"max_blocks": -1}, "max_blocks must be >= 0, got -1"),
        ({"max_threads": 0}, "max_threads must be >= 1, got 0"),
        ({"max_depth": -1}, "max_depth must be >= 0, got -1"),
        ({"max_seconds": 0.0}, "max_seconds must be > 0 or None, got 0.0"),
    ],
)
def test_impossible_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)


def test_every_limit_has_a_name_and_the_sequential_ones_do_not_fork():
    assert Limits.names() == (*(field.name for field in fields(Limits)), "max_context")
    limits = Limits(max_total_tokens=5, max_threads=3)
    assert limits.forks
    assert not limits.sequential().forks
    assert not Limits(max_blocks=0).forks
    assert limits.sequential() == Limits(max_total_tokens=5, max_threads=3, max_depth=0)


def test_total_tokens_in_sequential_text():
    rollout = decode([[105] * 9 + [EOS]], max_total_tokens=6)
    assert rollout.response_ids.tolist() == [105] * 6
    assert (rollout.status, rollout.reason) == ("length", "max_total_tokens is used up")
    assert rollout.limits_hit == {"max_total_tokens": 1}
    assert not rollout.forced


def test_a_response_of_exactly_the_budget_hits_nothing():
    rollout = decode([[105] * 5 + [EOS]], max_total_tokens=6)
    assert (rollout.status, rollout.limits_hit) == ("done", {})


def test_total_tokens_inside_a_block_are_shared_equally_and_the_block_is_closed():
    # Left after the outlines: 50; glue of two threads with forced closers: 5 + 4 + 1 + 4 = 14.
    rollout = decode([FORK, [106] * 99, [107] * 99], max_total_tokens=len(FORK) + 50)
    one, two = ([token] * 18 for token in (106, 107))
    body = [*FORK, NEWLINE, *thread(1, *one, NEWLINE), *thread(2, *two, NEWLINE), NEWLINE, P_]
    assert rollout.response_ids.tolist() == body
    assert rollout.limits_hit == {"max_total_tokens": 3}
    assert rollout.reason == "max_total_tokens is used up"
    assert (rollout.status, rollout.forced) == ("length", 3)
    assert closed(rollout)


def test_no_room_for_a_thread_closes_the_block_without_threads():
    rollout = decode([FORK], max_total_tokens=len(FORK) + 15)
    assert rollout.response_ids.tolist() == [*FORK, *TAG_IDS.forced_block_close]
    assert rollout.limits_hit == {"max_total_tokens": 1}
    assert rollout.status == "length"


def test_thread_tokens_end_the_thread_only():
    rollout = decode([FORK, [106] * 9, [107, NEWLINE, T_], [P_, 105, EOS]], max_thread_tokens=4)
    body = block([106] * 4 + [NEWLINE], [107, NEWLINE])
    assert rollout.response_ids.tolist() == [*body, 105, EOS]
    assert rollout.limits_hit == {"max_thread_tokens": 1}
    assert (rollout.status, rollout.forced, rollout.complete) == ("done", 1, False)
    assert [unit.completion.tolist() for unit in rollout.units][1] == [106] * 4


def test_nested_threads_share_their_thread_s_budget():
    inner = outlines(1, 2, plan=111)
    left = 60 - len(inner)
    script = [outlines(1), inner, [106] * 99, [107] * 99, [EOS]]
    rollout = decode(script, max_thread_tokens=60)
    threads = [call for call in rollout.calls if len(call.path) == 2]
    assert [len(call.completion) for call in threads] == [(left - 14) // 2] * 2
    assert rollout.limits_hit["max_thread_tokens"] >= 2
    assert closed(rollout)


def test_blocks_after_the_last_allowed_one_are_written_without_a_fork_and_counted():
    second = [*block([108]), 105, EOS]
    rollout = decode([FORK, [106, T_], [107, T_], [P_, *second]], max_blocks=1)
    assert rollout.response_ids.tolist() == [*block([106], [107]), *second]
    assert rollout.limits_hit == {"max_blocks": 1}
    assert len(rollout.units) == 4
    assert rollout.ok
    assert not decode([FORK, [106, T_], [107, T_], [P_, 105, EOS]], max_blocks=1).limits_hit


def test_further_outlines_get_no_thread():
    rollout = decode([outlines(1, 2, 3), [106, T_], [107, T_], [P_, EOS]], max_threads=2)
    assert rollout.limits_hit == {"max_threads": 1}
    assert rollout.stats.num_threads == 2
    assert rollout.ok


def test_depth_0_writes_everything_in_one_call():
    text = [*block([106], [107]), 105, EOS]
    rollout = decode([text], max_depth=0)
    assert rollout.response_ids.tolist() == text
    assert len(rollout.calls) == 1
    assert rollout.calls[0].finish == "stop"
    assert rollout.limits_hit == {"max_depth": 1}


def test_depth_1_is_the_flat_format_and_a_block_written_in_a_thread_is_closed():
    """The thread's stop is its first </Thread>; what it left open by then is closed, or it would swallow thread 2."""
    inner = [*outlines(1), NEWLINE, *thread(1, 108)]
    rollout = decode([FORK, [106, *inner], [107, T_], [P_, EOS]], max_depth=1)
    first = [106, *inner, *TAG_IDS.forced_block_close, NEWLINE]
    assert rollout.response_ids.tolist() == [*block(first, [107]), EOS]
    assert rollout.limits_hit == {"max_depth": 1}
    assert rollout.forced == 2
    assert rollout.stats.num_threads == 3
    assert closed(rollout)


def test_depth_2_forks_once_inside_a_thread():
    script = [outlines(1), outlines(1), [106, *outlines(1), T_], [P_, T_], [P_, EOS]]
    rollout = decode(script, max_depth=2)
    assert [len(call.path) for call in rollout.calls] == [0, 1, 2, 1, 0]
    assert rollout.limits_hit == {"max_depth": 1}
    assert OS_ not in [stop for call in rollout.calls if len(call.path) == 2 for stop in call.completion[-1:]]


def test_seconds_cancel_what_is_in_flight():
    async def slowly() -> Rollout:
        engine = ScriptedEngine([FORK, [106, T_], [107, T_]], [EOS], latency=(0.0, 0.02))
        return await ForkJoinDecoder(engine, TAG_IDS, Limits(max_seconds=0.3), GREEDY).decode(PROMPT)

    rollout = asyncio.run(slowly())
    assert (rollout.status, rollout.reason) == ("cancelled", "max_seconds")
    assert rollout.limits_hit == {"max_seconds": 1}
    assert rollout.seconds < 3
    assert closed(rollout)


def test_the_engine_s_context_bounds_the_total():
    rollout = decode([[105] * 99], max_context=len(PROMPT) + 7)
    assert rollout.response_ids.tolist() == [105] * 7
    assert rollout.limits_hit == {"max_context": 1}
    assert rollout.reason == "max_context is used up"
    full = decode([[105]], max_context=len(PROMPT))
    assert (full.status, full.limits_hit, full.calls) == ("error", {"max_context": 1}, ())
    assert full.reason == "the prompt has 2 tokens and the engine's context 2: nothing can be written"


def test_no_call_can_outgrow_the_engine_s_context():
    script = [outlines(1, 2), outlines(1, 2), [106] * 99, [106] * 99, [P_, *[106] * 99], [107] * 99, [P_, EOS]]
    engine = ScriptedEngine(script, [EOS], max_context=120)
    rollout = asyncio.run(ForkJoinDecoder(engine, TAG_IDS, Limits(), GREEDY).decode(PROMPT))
    assert len(engine.requests) >= 5
    assert all(len(request.context) + request.max_tokens <= 120 for request in engine.requests)
    assert "max_context" in rollout.limits_hit
    assert closed(rollout)


def test_units_are_those_of_the_joined_ids_when_nothing_was_forced():
    rollout = decode([FORK, [106, T_], [107, T_], [P_, 105, EOS]])
    assert rollout.complete
    assert rollout.units == extract_units(rollout.ids, TAG_IDS, len(PROMPT))
