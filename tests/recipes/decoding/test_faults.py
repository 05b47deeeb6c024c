"""A server that fails in every way there is: nothing lost, nothing doubled, every trajectory accounted for."""

import asyncio
import json
import random
import re
import threading
import time

import numpy as np
import pytest

from tests.recipes.decoding.test_openai_engine import CONTEXT, ask, decoder_of, engine_of, prompts
from tests.support.rollouts import FORKED
from tw_recipes.decoding import EngineError, Request
from tw_recipes.rollout import Prompt, read_trajectories, rollout

PASSING = ("429", "500", "reset", "cut", "abort", "hang")
LASTING = {
    "count": r"its counts do not add up: expected .*, got ",
    "no_ids": r"no token_ids and prompt_token_ids",
    "past_stop": r"tokens past the stop id",
}


def same(first, second) -> bool:
    return all(np.array_equal(a.ids, b.ids) and a.key == b.key for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_costs_a_try_and_nothing_else(serve, tokenizer, fault):
    server = serve()
    engine = engine_of(server, tokenizer, timeout_s=0.5 if fault == "hang" else 30.0)
    whole = ask(engine, Request(CONTEXT, (tokenizer.eos_token_id,), 500))
    first = len(server.calls) + 1
    server.fault = lambda number, body: fault if number in (first, first + 1) else ""
    again = ask(engine, Request(CONTEXT, (tokenizer.eos_token_id,), 500))
    assert again.attempts == 3
    np.testing.assert_array_equal(again.ids, whole.ids)
    assert server.faults == {fault: 2}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_is_an_error_with_server_reason_and_tries(serve, tokenizer, fault):
    server = serve()
    engine = engine_of(server, tokenizer, attempts=3, timeout_s=0.2 if fault == "hang" else 30.0)
    server.fault = lambda number, body: fault
    with pytest.raises(EngineError, match=f"{server.name}") as lost:
        ask(engine, Request(CONTEXT, (tokenizer.eos_token_id,), 500))
    expected = {
        "429": "HTTP 429: no luck",
        "500": "HTTP 500: no luck",
        "reset": "connection failed",
        "cut": "cut off|connection failed",
        "abort": "aborted",
        "hang": "no reply within the timeout",
    }
    assert lost.match(expected[fault])
    assert server.faults == {fault: 3}


@pytest.mark.parametrize("fault", LASTING)
def test_a_reply_that_does_not_add_up_is_an_error_at_once(serve, tokenizer, fault):
    server = serve(eos=())
    engine = engine_of(server, tokenizer)
    server.fault = lambda number, body: fault
    (lost,) = decoder_of(engine, tokenizer).decode_all([CONTEXT])
    assert lost.status == "error"
    assert server.faults == {fault: 1}
    assert re.search(LASTING[fault], lost.reason)
    assert server.name in lost.reason


@pytest.mark.parametrize("stream", [False, True])
def test_forty_trajectories_through_all_faults_equal_those_without(serve, tokenizer, stream):
    server = serve()
    engine = engine_of(server, tokenizer, timeout_s=1.0)
    decoder = decoder_of(engine, tokenizer)
    keys = [f"p{n}" for n in range(40)]
    clean = decoder.decode_all(prompts(tokenizer, 40), keys)
    draw = random.Random(5)
    faults = ("429", "500", "reset", "cut", "abort") * 3 + ("hang",)
    server.fault = lambda number, body: draw.choice(faults) if draw.random() < 0.3 else ""

    async def run():
        told = [[] for _ in keys]
        listeners = [events.append if stream else None for events in told]
        calls = (
            decoder.decode(prompt, key, on_event=listener)
            for prompt, key, listener in zip(prompts(tokenizer, 40), keys, listeners, strict=True)
        )
        try:
            return await asyncio.gather(*calls), told
        finally:
            await engine.aclose()

    rough, told = asyncio.run(run())
    assert same(clean, rough)
    assert all(one.complete for one in rough)
    assert all(server.faults[fault] for fault in set(faults))
    assert sum(call.attempts for one in rough for call in one.calls) == 40 * 4 + server.faults.total()
    if stream:  # every id is told exactly once, by tokens or (after a second try) by its call
        for one, events in zip(rough, told, strict=True):
            whole = [event.ids for event in events if event.kind == "call"]
            assert sorted(whole) == sorted(tuple(call.completion.tolist()) for call in one.calls)


def test_a_server_killed_and_started_again_in_the_middle_of_a_run(serve, tokenizer, tmp_path):
    server = serve(seconds=0.02)
    engine = engine_of(server, tokenizer, attempts=12)
    decoder = decoder_of(engine, tokenizer, max_calls=8)

    def kill_and_start():
        for _ in range(2):
            before = len(server.calls)
            while len(server.calls) < before + 40:
                time.sleep(0.005)
            server.kill()
            time.sleep(0.2)
            server.start()

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    source = [Prompt(f"p{n}", ids) for n, ids in enumerate(prompts(tokenizer, 60))]
    summary = rollout(source, decoder, tokenizer, tmp_path / "out.jsonl", concurrency=20)
    killer.join()
    rows = list(read_trajectories(tmp_path / "out.jsonl"))
    assert summary.statuses == {"done": 60}
    assert sorted(row["key"] for row in rows) == sorted(f"p{n}#0" for n in range(60))
    assert {row["text"] for row in rows} == {FORKED + tokenizer.eos_token}
    assert any(call.get("attempts", 1) > 1 for row in rows for call in row["calls"])


def test_a_server_that_stays_away_is_accounted_for_and_the_run_goes_on_later(serve, tokenizer, tmp_path):
    server = serve(seconds=0.01)
    engine = engine_of(server, tokenizer, attempts=2)
    server.fault = lambda number, body: server.kill() or "reset" if number == 60 else ""
    source = [Prompt(f"p{n}", ids) for n, ids in enumerate(prompts(tokenizer, 30))]
    decoder = decoder_of(engine, tokenizer, max_calls=8)
    summary = rollout(source, decoder, tokenizer, tmp_path / "out.jsonl", concurrency=10)
    assert summary.written == 30
    assert summary.statuses["error"] > 0
    assert summary.statuses["done"] + summary.statuses["error"] == 30
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(server.name in row["reason"] for row in rows if row["status"] == "error")
    assert not any(row["format_ok"] and row["status"] == "error" and row["forked_threads"] > 2 for row in rows)


def test_a_replica_that_dies_in_the_middle_hands_its_calls_over(serve, tokenizer):
    servers = [serve(seconds=0.01) for _ in range(2)]
    engine = engine_of(servers, tokenizer)
    decoder = decoder_of(engine, tokenizer, max_calls=8)
    clean = decoder.decode_all(prompts(tokenizer, 30))
    seen = len(servers[0].calls)
    servers[0].fault = lambda number, body: servers[0].kill() or "reset" if number == seen + 20 else ""
    rough = decoder.decode_all(prompts(tokenizer, 30))
    assert same(clean, rough)
    moved = [one for one in rough if len({call.replica for call in one.calls}) > 1]
    assert moved
    for one in moved:  # once away, it does not go back while the home is dead
        replicas = [call.replica for call in sorted(one.calls, key=lambda call: call.ended)]
        assert replicas == sorted(replicas, key=[servers[0].name, servers[1].name].index)


def test_a_busy_replica_keeps_its_trajectories(serve, tokenizer):
    """429 and 500 are answers: the replica lives and holds the prefix, so its calls wait instead of moving."""
    servers = [serve() for _ in range(2)]
    engine = engine_of(servers, tokenizer, attempts=30, max_backoff_s=0.02)
    for server in servers:
        server.fault = lambda number, body: ("429", "500", "")[number % 3]
    rollouts = decoder_of(engine, tokenizer, max_calls=4).decode_all(prompts(tokenizer, 12))
    assert all(one.complete for one in rollouts)
    assert all(len({call.replica for call in one.calls}) == 1 for one in rollouts)


def test_a_cancelled_trajectory_leaves_no_call_behind(serve, tokenizer):
    server = serve(seconds=0.2)
    engine = engine_of(server, tokenizer)
    decoder = decoder_of(engine, tokenizer)

    async def run():
        before = len(server.calls)
        going = asyncio.create_task(decoder.decode(CONTEXT, "a"))
        while len(server.calls) == before:
            await asyncio.sleep(0.001)
        assert decoder.cancel("a")
        ended = await going
        after = len(server.calls)
        await asyncio.sleep(0.3)
        await engine.aclose()
        return ended, after

    ended, after = asyncio.run(run())
    assert ended.status == "cancelled"
    assert len(server.calls) == after
