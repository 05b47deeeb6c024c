"""The decoder on random engines: any tokens, any stop, any failure, any limits. What must hold whatever happens.

Each call of these engines writes words that no other call writes, so that a context shows whose tokens it holds.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from tests.support.trajectories import CharTokenizer
from tw_core import Block, ReasoningTrie, TagIds, Thread, check_ids, extract_units, parse, render
from tw_recipes.decoding import GREEDY, Completion, EngineError, ForkJoinDecoder, Limits, Request, Rollout
from tw_recipes.decoding.rollout import Call, Path

CHAR = CharTokenizer()
TAG_IDS = TagIds.from_tokenizer(CHAR)
NEWLINE, EOS, WORD = 110, 50, -1
PROMPT = CHAR.encode("Q<Parallel></Thread>:")
THREAD_CLOSE, BLOCK_CLOSE = TAG_IDS.thread_close, TAG_IDS.parallel_close


def forks(*numbers: str) -> str:
    outlines = "".join(f"<Outline>{number}: x</Outline>" for number in numbers)
    return f"<Parallel>\n<Outlines>{outlines}</Outlines>"


_texts = st.sampled_from(
    [
        *(forks("1", "2"), forks("1"), forks("2", "1.1", "2"), forks("3", "1", "2")),
        *("<Outlines><Outline>1:</Outline></Outlines>", "<Parallel>", "</Parallel>", "\n</Parallel>", "<Thread>\n1:"),
        *("</Outlines>", "<Outline>x", "</Thread>", "\n</Thread>", "<Conclusion>", "</Conclusion>", "\n", "1:", "<n>"),
    ]
)
_pieces = st.one_of(_texts.map(CHAR.encode), st.just([WORD]), st.just([WORD, WORD]), st.just([EOS]))
_streams = st.lists(_pieces, max_size=8).map(lambda pieces: [token for piece in pieces for token in piece])


@dataclass(frozen=True)
class Answer:
    """One answer of the engine: what it would write and what goes wrong with it.

    Attributes:
        fork: What opens the next block, where one may be opened; nothing ends the stream instead.
        stream: Written as it is, in the place of what a trained model would write, if there is anything.
        fault: What goes wrong.
        pauses: How often others run before the answer is there.
    """

    fork: list[int]
    stream: list[int]
    fault: str
    pauses: int

    def tokens(self, request: Request) -> list[int]:
        if self.stream:
            return self.stream
        joined = request.context[-2:].tolist() == [THREAD_CLOSE, NEWLINE]
        fork = self.fork if TAG_IDS.outlines_close in request.stop_ids else []
        end = [WORD, THREAD_CLOSE if THREAD_CLOSE in request.stop_ids else EOS]
        return [*([BLOCK_CLOSE] if joined else []), WORD, *(fork or end)]


_forks = st.sampled_from([(), (), (), ("1", "2"), ("1", "2", "3"), ("1",), ("2", "1.1", "2")]).map(
    lambda numbers: CHAR.encode(forks(*numbers)) if numbers else []
)
_faults = st.sampled_from([""] * 30 + ["lost", "bug", "runs on", "stops early", "negative", "nan", "cancel"])
_apt = st.builds(Answer, _forks, st.just([]), st.just(""), st.integers(0, 2))
_any = st.builds(Answer, _forks, st.one_of(st.just([]), st.just([]), _streams), _faults, st.integers(0, 2))
_limits = st.builds(
    Limits,
    max_total_tokens=st.sampled_from([10_000, 10_000, 300, 90, 1]),
    max_thread_tokens=st.sampled_from([1_000, 1_000, 90, 4, 1]),
    max_blocks=st.sampled_from([3, 3, 2, 1, 0]),
    max_threads=st.sampled_from([4, 4, 2, 1]),
    max_depth=st.sampled_from([3, 3, 2, 1, 0]),
)


class RandomEngine:
    """Answers call k with answer k, going round; written ids hold the number of the call."""

    eos_ids = (EOS,)

    def __init__(self, answers: Sequence[Answer], max_context: int | None) -> None:
        self.answers, self.max_context = answers, max_context
        self.requests: list[Request] = []
        self.decoder: ForkJoinDecoder | None = None

    async def generate(self, request: Request) -> Completion:
        call = len(self.requests)
        self.requests.append(request)
        answer = self.answers[call % len(self.answers)]
        for _ in range(answer.pauses):
            await asyncio.sleep(0)
        if answer.fault == "lost":
            raise EngineError("lost")
        if answer.fault == "bug":
            raise RuntimeError("bug")
        if answer.fault == "cancel":
            assert self.decoder is not None
            self.decoder.cancel(request.key)
            await asyncio.sleep(0)
        ids = np.array([1_000 + call if token == WORD else token for token in answer.tokens(request)], dtype=np.int64)
        if answer.fault != "runs on":
            stops = np.flatnonzero(np.isin(ids, request.stop_ids))
            ids = ids[: min(int(stops[0]) + 1 if len(stops) else len(ids), request.max_tokens)]
        if answer.fault == "stops early":
            ids = ids[:-1]
        if answer.fault == "negative":
            ids = ids - 60
        logprobs = np.full(len(ids), np.nan if answer.fault == "nan" else -1.0)
        stopped = bool(len(ids)) and int(ids[-1]) in request.stop_ids
        return Completion(ids, logprobs, "stop" if stopped else "length")

    async def aclose(self) -> None:
        """Nothing to give back."""


@st.composite
def played(draw: st.DrawFn) -> Rollout:
    """A decoded trajectory of a random engine."""
    apt = draw(st.booleans())
    answers = draw(st.lists(_apt if apt else _any, min_size=1, max_size=10))
    bound = None if apt else draw(st.sampled_from([None, None, None, 400, 150, len(PROMPT)]))
    engine = RandomEngine(answers, bound)
    limits = Limits(max_blocks=2, max_depth=2) if apt else draw(_limits)
    engine.decoder = ForkJoinDecoder(engine, TAG_IDS, limits, GREEDY, max_calls=draw(st.integers(1, 4)))
    rollout = asyncio.run(engine.decoder.decode(PROMPT, "key"))
    for request in engine.requests:
        assert request.key == "key"
        assert request.max_tokens >= 1
        assert bound is None or len(request.context) + request.max_tokens <= bound
    assert len(engine.requests) <= len(rollout.calls)
    return rollout


def words(ids: Sequence[int]) -> set[int]:
    return {int(token) for token in ids if token >= 1_000}


def text(ids: Sequence[int]) -> str:
    return CHAR.decode([165 if token == EOS else token for token in ids])


def sees(reader: Path, writer: Path) -> bool:
    """Whether a call at `reader` may hold tokens of `writer`: not from another thread of the same block."""
    for mine, other in zip(reader, writer, strict=False):
        if mine != other:
            return mine[0] != other[0]
    return True


def closers(stream: list[int], in_thread: bool) -> tuple[list[int], list[int]]:
    """The stream as joined, and the ids that close what is open, by the grammar of texts."""
    opened = parse(("<Parallel><Thread>" if in_thread else "") + text(stream)).open_elements[in_thread:]
    kinds = [type(element) for element in opened if isinstance(element, Block | Thread)]
    if in_thread and not kinds:
        return stream, []
    body = stream[:-1] if stream[-1:] == [EOS] else stream
    found: list[int] = []
    for kind in reversed(kinds):
        found += [NEWLINE, TAG_IDS.thread_close if kind is Thread else TAG_IDS.parallel_close]
    if kinds and kinds[-1] is Block and body[-2:] == [THREAD_CLOSE, NEWLINE]:
        found = found[1:]
    return (body if found else stream), found


def assemble(calls: Sequence[Call], base: list[int], path: Path = ()) -> list[int]:
    """The joined ids of a stream from its calls alone; checks every context on the way."""
    own = [call for call in calls if call.path[: len(path)] == path]
    ids, place = list(base), 0
    while place < len(own):
        call = own[place]
        if call.path == path:
            assert call.context.tolist() == ids
            ids += call.completion.tolist()
            place += 1
            continue
        block = call.path[len(path)][0]
        members = [other for other in own[place:] if len(other.path) > len(path) and other.path[len(path)][0] == block]
        place += len(members)
        fork = list(ids)
        for order, number in enumerate(dict.fromkeys(other.path[len(path)][1] for other in members)):
            header = list(TAG_IDS.thread_header(number, first=True))
            inside = assemble(members, [*fork, *header], (*path, (block, number)))
            stream, closing = closers(inside[len(fork) + len(header) :], in_thread=True)
            ids += [*header[order > 0 :], *stream, *closing]
        ids.append(NEWLINE)
    return ids


def merged(units: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[list[int], list[int]]]:
    """Units with a call that went on after another one (a </Outlines> that did not fork) joined to it."""
    found: list[tuple[list[int], list[int]]] = []
    for context, completion in units:
        before = next((unit for unit in found if [*unit[0], *unit[1]] == context.tolist()), None)
        if before is not None:
            before[1].extend(completion.tolist())
        else:
            found.append((context.tolist(), completion.tolist()))
    return found


@settings(max_examples=150)
@given(played())
def test_there_is_a_closed_result_with_status_and_reason(rollout):
    response = text(rollout.response_ids)
    tree = parse(response)
    assert tree.open_elements == ()
    assert render(tree) == response
    assert rollout.status in ("done", "length", "error", "cancelled")
    assert rollout.reason
    assert set(rollout.limits_hit) <= set(Limits.names())
    failed = {call.finish for call in rollout.calls} & {"error", "cancelled"}
    assert (rollout.status in ("error", "cancelled")) == bool(failed or not rollout.calls)
    assert rollout.ok == (rollout.reason == "end of sequence")
    assert rollout.ids[: rollout.prompt_length].tolist() == PROMPT
    assert rollout.stats.total_tokens == len(rollout.response_ids)
    check_ids(rollout.ids, TAG_IDS, prompt_length=rollout.prompt_length)


@settings(max_examples=150)
@given(played())
def test_no_call_sees_another_thread_of_its_block(rollout):
    writers = {}
    for call in rollout.calls:
        for word in words(call.completion):
            writers[word] = call.path
    for call in rollout.calls:
        for word in words(call.context):
            assert sees(call.path, writers[word]), "a thread's context holds a sibling's tokens"


@settings(max_examples=150)
@given(played())
def test_units_reassemble_to_the_joined_ids(rollout):
    ids = assemble(rollout.calls, PROMPT)
    stream, closing = closers(ids[len(PROMPT) :], in_thread=False)
    assert rollout.ids.tolist() == [*PROMPT, *stream, *closing]
    assert bool(closing) <= bool(rollout.forced)
    assert len(rollout.logprobs) == len(rollout.units)


@settings(max_examples=150)
@given(played())
def test_units_are_those_of_the_joined_ids_when_nothing_was_forced_or_refused(rollout):
    if rollout.forced or set(rollout.limits_hit) & {"max_depth", "max_blocks"}:
        return
    assert merged(rollout.units) == [
        (context.tolist(), completion.tolist())
        for context, completion in extract_units(rollout.ids, TAG_IDS, rollout.prompt_length)
    ]


@settings(max_examples=100)
@given(played())
def test_every_generated_token_is_a_target_of_the_units_trie_once(rollout):
    if rollout.units:
        packed = ReasoningTrie.from_units(rollout.units).pack()
        assert int(packed.target_weights.sum()) == rollout.generated_tokens
