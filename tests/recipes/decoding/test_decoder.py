"""ForkJoinDecoder on a scripted engine: every edge of SPEC section 4, failures, options, events."""

import asyncio

import numpy as np
import pytest

from tests.support.forking import EOS, OS, OS_, P_, T_, P, block, echo_key, outlines, thread
from tests.support.trajectories import COLON, DIGITS, NEWLINE, TAG_IDS, CharTokenizer
from tw_core import TAGS, GrammarError, TagIds, TrieError, check_format, extract_units, parallel_stats
from tw_recipes.decoding import (
    GREEDY,
    Completion,
    EngineError,
    Event,
    ForkJoinDecoder,
    Limits,
    Request,
    Rollout,
    Sampling,
    ScriptedEngine,
)

PROMPT = [100, 101, P, OS_]  # tags in a prompt are text
FORK = [105, *outlines(1, 2)]


def decoder(script, **options) -> ForkJoinDecoder:
    engine = script if isinstance(script, ScriptedEngine) else ScriptedEngine(script, [EOS], logprob=-0.25)
    return ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY, **options)


def decode(script, prompt=PROMPT, **options) -> Rollout:
    return asyncio.run(decoder(script, **options).decode(prompt))


def contexts(rollout: Rollout) -> list[list[int]]:
    return [call.context.tolist() for call in rollout.calls]


def header(number: int) -> list[int]:
    return [NEWLINE, *thread(number)[:-1]]


# One trajectory.


def test_one_block_is_forked_joined_and_finished():
    rollout = decode([FORK, [106, T_], [107, 107, T_], [P_, 108, EOS]])
    joined = [*PROMPT, 105, *block([106], [107, 107])]
    assert rollout.ids.tolist() == [*joined, 108, EOS]
    assert contexts(rollout) == [
        PROMPT,
        [*PROMPT, *FORK, *header(1)],
        [*PROMPT, *FORK, *header(2)],
        joined[:-1],
    ]
    assert [call.kind for call in rollout.calls] == rollout.kinds == ["sequential", "thread", "thread", "sequential"]
    assert [call.path for call in rollout.calls] == [(), ((0, "1"),), ((0, "2"),), ()]
    assert (rollout.status, rollout.reason, rollout.forced, rollout.limits_hit) == ("done", "end of sequence", 0, {})
    assert rollout.complete
    assert rollout.units == extract_units(rollout.ids, TAG_IDS, len(PROMPT))
    assert [values.tolist() for values in rollout.logprobs] == [[-0.25] * len(c) for _, c in rollout.units]
    assert rollout.stats == parallel_stats(rollout.ids, TAG_IDS, prompt_length=len(PROMPT))
    assert rollout.generated_tokens == len(FORK) + 2 + 3 + 3


def test_stops_are_outlines_in_the_open_and_threads_ends_inside():
    engine = ScriptedEngine([FORK, [106, T_], [107, T_], [P_, EOS]], [EOS, 99])
    decode(engine, limits=Limits(max_depth=1))
    assert [request.stop_ids for request in engine.requests] == [
        (OS_, EOS, 99),
        (T_, EOS, 99),
        (T_, EOS, 99),
        (OS_, EOS, 99),
    ]
    engine = ScriptedEngine([FORK, [106, T_], [107, T_], [P_, EOS]], [EOS])
    decode(engine)
    assert engine.requests[1].stop_ids == (OS_, T_, EOS)


def test_nested_blocks_are_the_same_machine_again():
    script = [outlines(1), [112, *outlines(1, 2)], [113, T_], [114, T_], [P_, 115, T_], [P_, EOS]]
    rollout = decode(script)
    inner = [112, *block([113], [114]), 115]
    assert rollout.response_ids.tolist() == [*block(inner), EOS]
    assert [call.path for call in rollout.calls][1:5] == [
        ((0, "1"),),
        ((0, "1"), (0, "1")),
        ((0, "1"), (0, "2")),
        ((0, "1"),),
    ]
    assert rollout.units == extract_units(rollout.ids, TAG_IDS, len(PROMPT))
    assert rollout.stats.max_depth == 2
    assert rollout.complete


def test_deep_nesting():
    depth = 40
    script = [outlines(1)] * depth + [[106, T_]] + [[P_, T_]] * (depth - 1) + [[P_, EOS]]
    rollout = decode(script, limits=Limits(max_depth=depth))
    assert rollout.stats.max_depth == depth
    assert rollout.complete
    assert rollout.units == extract_units(rollout.ids, TAG_IDS, len(PROMPT))


def test_later_blocks_need_outlines_of_their_own():
    """The published controller forks again on the outlines of an earlier block."""
    rollout = decode([FORK, [106, T_], [107, T_], [P_, 108, OS_], [109, EOS]])
    assert rollout.stats.num_threads == 2
    assert len(rollout.calls) == 5
    assert rollout.response_ids.tolist() == [105, *block([106], [107]), 108, OS_, 109, EOS]
    twice = decode([outlines(1), [106, T_], [P_, *outlines(1)], [107, T_], [P_, EOS]])
    assert twice.response_ids.tolist() == [*block([106]), *block([107]), EOS]
    assert [call.path for call in twice.calls if call.path] == [((0, "1"),), ((1, "1"),)]


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param([OS_], id="no_outlines"),
        pytest.param([P, OS, OS_], id="empty_outlines"),
        pytest.param([P, OS, 5, 110, 6, OS_], id="no_number"),
        pytest.param([P, OS, 5, DIGITS[1], COLON, OS_], id="unclosed_outline"),
        pytest.param([*outlines(1)[:-1], OS, OS_], id="reopened_without_outlines"),
    ],
)
def test_outlines_without_a_fresh_numbered_one_do_not_fork(opening):
    rollout = decode([opening, [105, EOS]])
    assert [call.kind for call in rollout.calls] == ["sequential"] * 2
    assert rollout.calls[1].context.tolist() == [*PROMPT, *opening]
    assert rollout.ok


def test_duplicate_numbers_collapse_and_any_numbers_are_taken():
    rollout = decode([outlines(3, 1, 3), [106, T_], [107, T_], [P_, EOS]])
    assert [call.path for call in rollout.calls if call.path] == [((0, "3"),), ((0, "1"),)]
    body = [NEWLINE, *thread(3, 106), *thread(1, 107), NEWLINE, P_, EOS]
    assert rollout.response_ids.tolist() == [*outlines(3, 1, 3), *body]
    char = CharTokenizer()
    text = "<Parallel>\n<Outlines>\n<Outline> 2.1 : a</Outline>\n</Outlines>"
    engine = ScriptedEngine([char.encode(text)], [EOS])
    rollout = asyncio.run(ForkJoinDecoder(engine, TagIds.from_tokenizer(char)).decode(char.encode("Q")))
    assert char.decode(rollout.calls[1].context) == f"Q{text}\n<Thread>\n2.1:"


@pytest.mark.parametrize("at", [0, 1], ids=["first_thread", "second_thread"])
@pytest.mark.parametrize("written", [[106, EOS], [EOS]], ids=["after_a_token", "at_once"])
def test_an_end_of_sequence_in_a_thread_ends_that_thread_alone(at, written):
    bodies: list[list[int]] = [[107, T_], [107, T_]]
    bodies[at] = written
    rollout = decode([outlines(1, 2), *bodies, [P_, 108, EOS]])
    closed = [[107], [107]]
    closed[at] = [*written[:-1], NEWLINE]
    assert rollout.response_ids.tolist() == [*block(*closed), 108, EOS]
    # The unit keeps what was written, the joined ids hold the forced closer instead of the end of the sequence.
    assert [unit.completion.tolist() for unit in rollout.units][1:3] == bodies
    assert (rollout.status, rollout.forced, rollout.complete) == ("done", 1, False)


def test_an_engine_that_writes_nothing_in_a_thread():
    rollout = decode([outlines(1, 2), [], [107, T_], [P_, EOS]])
    assert rollout.response_ids.tolist() == [*block([NEWLINE], [107]), EOS]
    assert len(rollout.units) == 3
    assert len(rollout.logprobs) == 3
    assert rollout.status == "done"
    assert decode([[]]).status == "length"
    assert decode([[]]).reason == "the engine wrote nothing"


def test_the_end_of_sequence_right_after_a_join_closes_the_block_in_canonical_bytes():
    rollout = decode([outlines(1, 2), [106, NEWLINE, T_], [107, NEWLINE, T_], [EOS]])
    assert rollout.response_ids.tolist() == block([106, NEWLINE], [107, NEWLINE])
    assert (rollout.status, rollout.forced) == ("done", 1)
    assert rollout.units[-1].completion.tolist() == [EOS]


def test_unterminated_output_is_closed_innermost_first():
    char, eos = CharTokenizer(), 1
    script = [
        char.encode("a<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n</Outlines>"),
        char.encode(" b<Parallel>\n<Outlines>\n<Outline>1: y</Outline>\n</Outlines>"),
        char.encode(" c"),
        char.encode("\n</Parallel>\n<Parallel>\n<Outlines>\n<Outline>1: z"),
        char.encode(" d"),
    ]
    engine = ScriptedEngine([np.array(line) for line in script], [500_000 + eos])
    rollout = asyncio.run(ForkJoinDecoder(engine, TagIds.from_tokenizer(char)).decode(char.encode("Q")))
    text = char.decode(rollout.response_ids)
    assert text.startswith("a<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n</Outlines>\n<Thread>\n1: b<Parallel>\n")
    assert text.endswith("1: z\n</Parallel>\n</Thread>\n d\n</Parallel>")
    assert rollout.status == "length"
    assert {problem.kind for problem in check_format(text).problems} <= {"unclosed", "missing", "gap", "number"}


def test_a_thread_that_writes_threads_without_a_fork_is_closed_where_it_stopped():
    inner = [P, *thread(7, 113)]
    rollout = decode([outlines(1, 2), inner, [107, T_], [P_, EOS]])
    assert rollout.response_ids.tolist() == [*block([*inner, NEWLINE, P_, NEWLINE], [107]), EOS]
    assert rollout.forced == 2
    assert rollout.stats.num_blocks == 2


# Failures.


@pytest.mark.parametrize("problem", [EngineError("server gone"), RuntimeError("bug"), ConnectionError(), OSError("x")])
@pytest.mark.parametrize("at", [0, 2, 3], ids=["first_call", "in_a_thread", "after_the_join"])
def test_a_lost_call_ends_the_trajectory_with_status_and_reason(problem, at):
    script: list = [FORK, [106, T_], [107, T_], [P_, 108, EOS]]
    script[at] = problem
    rollout = decode(script)
    assert rollout.status == "error"
    kind = "" if isinstance(problem, EngineError) else f"{type(problem).__name__}: "
    assert rollout.reason == f"{kind}{problem}"
    assert not rollout.ok
    lost = [call for call in rollout.calls if call.error]
    assert [call.finish for call in lost] == ["error"]
    body = {0: [], 2: [105, *block([106], [NEWLINE])], 3: [105, *block([106], [107])]}[at]
    assert rollout.response_ids.tolist() == body
    assert len(rollout.units) == {0: 0, 2: 2, 3: 3}[at]


def test_a_thread_that_fails_lets_its_siblings_finish():
    async def answer(request: Request) -> Completion:
        if request.context[-2] == DIGITS[1]:
            raise EngineError("thread 1 is lost")
        await asyncio.sleep(0.01)
        return Completion(np.array([107, T_]))

    engine = ScriptedEngine([FORK], [EOS])
    scripted = engine.generate

    async def generate(request: Request) -> Completion:
        return await (answer(request) if engine.requests else scripted(request))

    engine.generate = generate
    rollout = decode(engine)
    assert (rollout.status, rollout.reason) == ("error", "thread 1 is lost")
    assert rollout.response_ids.tolist() == [105, *block([NEWLINE], [107])]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Completion(np.array([105, OS_, 106]), finish="length"), "1 tokens past the stop id"),
        (Completion(np.array([105, 106])), "stopped at id 106, which is none of the stop ids"),
        (Completion(np.array([105, -1])), "gave no token ids"),
        (Completion(np.array([EOS]), np.array([np.nan])), "no finite numbers"),
    ],
)
def test_an_impossible_answer_is_a_lost_call(answer, reason):
    rollout = decode([answer])
    assert rollout.status == "error"
    assert reason in rollout.reason
    assert rollout.response_ids.tolist() == []


def test_misuse_is_raised_as_it_is_also_from_a_thread():
    with pytest.raises(ValueError, match=r"^no such request$"):
        decode([ValueError("no such request")])
    with pytest.raises(ValueError, match=r"^no such request$"):
        decode([FORK, ValueError("no such request"), [107, T_]])


def test_an_engine_that_stops_early_is_a_length_with_a_reason():
    rollout = decode([[105, 106]])
    assert (rollout.status, rollout.reason) == ("length", "the engine stopped after 2 tokens")


def test_bad_arguments_are_named():
    engine = ScriptedEngine([], [])
    with pytest.raises(ValueError, match="eos_ids must hold at least one id"):
        ForkJoinDecoder(engine, TAG_IDS)
    with pytest.raises(ValueError, match="max_calls must be >= 1, got 0"):
        decoder([], max_calls=0)
    with pytest.raises(ValueError, match=r"eos_ids must not be tags, got \[8\]"):
        decoder([], eos_ids=[EOS, T_])
    bare = TagIds.from_mapping(dict(zip(TAGS, range(1, 11), strict=True)))
    with pytest.raises(GrammarError, match="TagIds has no newline"):
        ForkJoinDecoder(ScriptedEngine([], [EOS]), bare)
    with pytest.raises(ValueError, match="prompt_ids must hold at least one id"):
        decode([], prompt=[])
    with pytest.raises(TrieError, match="prompt_ids must not be negative"):
        decode([], prompt=[-1])


# Options.


def test_the_shared_prefix_is_warmed_before_the_threads():
    engine = ScriptedEngine(lambda r: [110, EOS] if r.max_tokens == 1 else echo_key(r), [EOS])
    rollout = decode(engine, prompt=[1_000], warm_prefix=True)
    assert [call.kind for call in rollout.calls] == ["sequential", "warm", "thread", "thread", "sequential"]
    warm, *threads = rollout.calls[1:4]
    assert warm.context.tolist() == [1_000, *FORK]
    assert len(warm.completion) == 1
    assert all(thread.started >= warm.ended for thread in threads)
    plain = decode(ScriptedEngine(echo_key, [EOS]), prompt=[1_000])
    assert rollout.ids.tolist() == plain.ids.tolist()
    assert rollout.units == plain.units, "the token of the warm call is thrown away"


def test_calls_have_seeds_of_their_own_that_do_not_depend_on_the_order():
    def seeds(prompts: list[list[int]]) -> dict[tuple, int]:
        engine = ScriptedEngine(echo_key, [EOS])
        ForkJoinDecoder(engine, TAG_IDS, sampling=Sampling(seed=3)).decode_all(prompts, [str(p[0]) for p in prompts])
        return {(request.key, request.context.tobytes()): request.seed for request in engine.requests}

    found = seeds([[1_000], [1_001]])
    assert found == seeds([[1_001], [1_000]])
    assert len(set(found.values())) == len(found) == 8
    assert {request.seed for request in _requests()} == {None}


def _requests() -> list[Request]:
    engine = ScriptedEngine(echo_key, [EOS])
    decode(engine, prompt=[1_000])
    return engine.requests


def test_events_tell_everything_in_order():
    events: list[Event] = []
    fork_join = decoder([FORK, [106, T_], [107, EOS], [P_, EOS]])
    rollout = asyncio.run(fork_join.decode(PROMPT, on_event=events.append))
    assert [event.kind for event in events if event.kind != "tokens"] == [
        *("call", "fork", "call", "call", "closed", "join", "call", "end"),
    ]
    assert next(event for event in events if event.kind == "fork").numbers == ("1", "2")
    shown = [id_ for event in events if event.path == () and event.kind in ("call", "join") for id_ in event.ids]
    assert [*PROMPT, *shown] == rollout.ids.tolist()
    tokens = [id_ for event in events if event.kind == "tokens" for id_ in event.ids]
    assert tokens == [id_ for call in rollout.calls for id_ in call.completion.tolist()]


def test_what_a_listener_raises_reaches_the_caller():
    for kind in ("tokens", "fork", "call", "join", "end"):

        def listener(event: Event, kind: str = kind) -> None:
            if event.kind == kind:
                raise LookupError(kind)

        with pytest.raises(LookupError, match=kind):
            asyncio.run(decoder([FORK, [106, T_], [107, T_], [P_, EOS]]).decode(PROMPT, on_event=listener))


def test_a_rollout_is_shown_in_one_line_and_knows_its_cache_share():
    rollout = decode([FORK, [106, T_], [107, T_], [P_, EOS]])
    assert "\n" not in repr(rollout)
    assert "status='done'" in repr(rollout)
    assert rollout.cached_share is None
    cached = decode([Completion(np.array([105, EOS]), cached_tokens=2)])
    assert cached.cached_share == 2 / len(PROMPT)
    assert cached.logprobs is None
