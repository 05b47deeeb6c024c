"""Many trajectories at once: kept apart, bounded, streamed, cancelled."""

import asyncio
from collections import Counter

import pytest

from tests.support.forking import EOS, block, echo_key
from tests.support.trajectories import DIGITS, NEWLINE, TAG_IDS
from tw_recipes.decoding import GREEDY, Completion, Event, ForkJoinDecoder, Request, ScriptedEngine


def decoder(engine: ScriptedEngine, **options) -> ForkJoinDecoder:
    return ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY, **options)


def test_thousands_in_flight_keep_apart_and_within_the_bound():
    count, bound = 3_000, 500
    running, most = 0, 0
    engine = ScriptedEngine(echo_key, [EOS])
    scripted = engine.generate

    async def generate(request: Request) -> Completion:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return await scripted(request)

    engine.generate = generate
    prompts = [[1_000 + place, 101] for place in range(count)]
    rollouts = decoder(engine, max_calls=bound).decode_all(prompts)
    assert most == bound
    for place, rollout in enumerate(rollouts):
        own = 1_000 + place
        body = block([own, DIGITS[1]], [own, DIGITS[2]])
        assert rollout.ids.tolist() == [own, 101, 105, *body, own, EOS]
    keys = Counter(request.key for request in engine.requests)
    assert keys == {str(place): 4 for place in range(count)}


def test_threads_of_a_fork_are_asked_at_once_and_never_see_each_other():
    engine = ScriptedEngine(echo_key, [EOS], latency=(0.05, 0.0))
    rollout = asyncio.run(decoder(engine).decode([1_000]))
    first, second = (call for call in rollout.calls if call.kind == "thread")
    assert first.started < second.ended
    assert second.started < first.ended
    assert rollout.seconds >= 0.15


def test_calls_wait_in_order_when_the_bound_is_reached():
    engine = ScriptedEngine(echo_key, [EOS], latency=(0.01, 0.0))
    rollouts = decoder(engine, max_calls=1).decode_all([[1_000], [1_001]])
    calls = sorted((call for rollout in rollouts for call in rollout.calls), key=lambda call: call.started)
    assert any(call.started - call.queued > 0.005 for call in calls)
    assert all(call.ended >= call.started >= call.queued >= 0 for call in calls)
    assert [request.key for request in engine.requests[:2]] == ["0", "1"]


async def test_a_stream_holds_no_more_than_it_may_and_yields_as_they_finish():
    drawn = []

    def prompts():
        for place in range(50):
            drawn.append(place)
            yield [1_000 + place]

    delays = {str(place): 0.05 if place == 0 else 0.0 for place in range(50)}
    engine = ScriptedEngine(echo_key, [EOS])
    scripted = engine.generate

    async def generate(request: Request) -> Completion:
        await asyncio.sleep(delays[request.key])
        return await scripted(request)

    engine.generate = generate
    places = []
    async for place, rollout in decoder(engine).stream(prompts(), max_trajectories=4):
        assert rollout.key == str(place)
        places.append(place)
        assert len(drawn) - len(places) <= 4
    assert sorted(places) == list(range(50))
    assert places[0] != 0


async def test_an_abandoned_stream_cancels_what_is_in_flight():
    engine = ScriptedEngine(echo_key, [EOS], latency=(0.01, 0.0))
    fork_join = decoder(engine)
    stream = fork_join.stream([[1_000 + place] for place in range(20)])
    await anext(stream)
    await stream.aclose()
    asked = len(engine.requests)
    await asyncio.sleep(0.05)
    assert len(engine.requests) == asked
    assert (await fork_join.decode([1_000], "3")).ok, "a key of a cancelled trajectory is free again"


async def test_keys_must_be_enough_and_not_in_flight_twice():
    fork_join = decoder(ScriptedEngine(echo_key, [EOS]))
    with pytest.raises(ValueError, match="keys must have one entry per prompt, got 1"):
        [entry async for entry in fork_join.stream([[1_000], [1_001]], ["a"])]
    with pytest.raises(ValueError, match="max_trajectories must be >= 1, got 0"):
        [entry async for entry in fork_join.stream([[1_000]], max_trajectories=0)]
    with pytest.raises(ValueError, match="key 'a' is already in flight"):
        await asyncio.gather(fork_join.decode([1_000], "a"), fork_join.decode([1_000], "a"))
    rollouts = await asyncio.gather(*(fork_join.decode([1_000]) for _ in range(5)))
    assert len({rollout.key for rollout in rollouts}) == 5
    staggered = [asyncio.create_task(fork_join.decode([1_000])) for _ in range(2)]
    await staggered[0]
    assert (await fork_join.decode([1_000])).ok
    await staggered[1]


async def test_decode_all_inside_a_running_loop():
    rollouts = decoder(ScriptedEngine(echo_key, [EOS])).decode_all([[1_000], [1_001]], ["x", "y"])
    assert [(rollout.key, rollout.ok) for rollout in rollouts] == [("x", True), ("y", True)]


def test_decode_all_closes_the_engine_also_after_misuse():
    closed = []

    class Engine(ScriptedEngine):
        async def aclose(self) -> None:
            closed.append(True)

    decoder(Engine(echo_key, [EOS])).decode_all([[1_000]])
    with pytest.raises(ValueError, match="no"):
        decoder(Engine([ValueError("no")], [EOS])).decode_all([[1_000]])
    assert closed == [True, True]


async def test_cancelling_echo_key_ends_with_a_closed_result():
    fork_join = decoder(ScriptedEngine(echo_key, [EOS], latency=(0.02, 0.0)))
    events: list[Event] = []
    task = asyncio.create_task(fork_join.decode([1_000], "gone", on_event=events.append))
    other = asyncio.create_task(fork_join.decode([1_001], "other"))
    while not any(event.kind == "fork" for event in events):
        await asyncio.sleep(0.001)
    assert fork_join.cancel("gone")
    rollout = await task
    assert (rollout.status, rollout.reason) == ("cancelled", "cancelled by the caller")
    assert rollout.response_ids.tolist() == [105, *block([NEWLINE], [NEWLINE])]
    assert [call.finish for call in rollout.calls] == ["stop", "cancelled", "cancelled"]
    assert not fork_join.cancel("gone")
    assert task.cancelling() == 0
    assert (await other).ok


async def test_cancelling_before_the_first_call_is_answered():
    fork_join = decoder(ScriptedEngine(echo_key, [EOS], latency=(9.0, 0.0)))
    task = asyncio.create_task(fork_join.decode([1_000], "gone"))
    await asyncio.sleep(0)
    fork_join.cancel("gone")
    rollout = await task
    assert (rollout.status, rollout.response_ids.tolist()) == ("cancelled", [])


async def test_cancelling_the_task_ends_it_without_a_result_and_frees_the_key():
    engine = ScriptedEngine(echo_key, [EOS])
    fork_join = decoder(engine, max_calls=1)
    task = asyncio.create_task(fork_join.decode([1_000], "a", on_event=lambda event: task.cancel()))
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.latency = (9.0, 0.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.03):
            await fork_join.decode([1_000], "a")
    engine.latency = (0.0, 0.0)
    assert (await fork_join.decode([1_000], "a")).ok
