"""extract_units against a played engine, and the defined results on ids no engine wrote."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from tests.support.trajectories import COLON, DIGITS, NEWLINE, TAG_IDS, CharTokenizer, Simulated, simulated, tag_soups
from tw_core import TAGS, GrammarError, TagIds, TrieError, Unit, extract_units, fork_numbers

P, P_, OS, OS_, OL, OL_, T, T_ = range(1, 9)
ONE, TWO = DIGITS[1], DIGITS[2]


def _pairs(units: list[Unit]) -> list[tuple[list[int], list[int]]]:
    return [(context.tolist(), completion.tolist()) for context, completion in units]


def _outlines(*numbers: int) -> list[int]:
    return [P, OS, *(i for n in numbers for i in (OL, n, COLON, 100, OL_)), OS_]


def _thread(number: int, *body: int) -> list[int]:
    return [T, NEWLINE, number, COLON, *body, T_]


@given(simulated(depth=3))
def test_units_are_the_calls_of_a_played_engine(played: Simulated) -> None:
    units = extract_units(played.ids, TAG_IDS, played.prompt_length)
    assert _pairs(units) == played.units


@given(simulated(depth=3))
def test_the_last_call_and_its_context_are_the_joined_ids(played: Simulated) -> None:
    units = extract_units(played.ids, TAG_IDS, played.prompt_length)
    if units:
        assert [*units[-1].context, *units[-1].completion] == played.ids


@given(simulated(), st.floats(0, 1))
def test_units_of_a_prefix_are_those_of_the_whole_cut(played: Simulated, share: float) -> None:
    stop = played.prompt_length + int((len(played.ids) - played.prompt_length) * share)
    *done, last = _pairs(extract_units(played.ids[:stop], TAG_IDS, played.prompt_length)) or [([], [])]
    assert done == played.units[: len(done)]
    if last != ([], []):
        context, completion = played.units[len(done)]
        assert last == (context, completion[: len(last[1])])


@given(simulated())
def test_fork_numbers_is_the_rule_that_extract_units_replays(played: Simulated) -> None:
    units = extract_units(played.ids, TAG_IDS, played.prompt_length)
    for place, (context, completion) in enumerate(units):
        forks = fork_numbers(np.concatenate([context, completion]), TAG_IDS, len(context))
        assert bool(forks) == (completion[-1] == OS_)
        if forks:  # the next call is the first thread
            header = TAG_IDS.thread_header(forks[0], first=True)
            assert tuple(units[place + 1].context[-len(header) :].tolist()) == header


@given(simulated())
def test_opaque_numbers_are_copied_from_the_ids(played: Simulated) -> None:
    opaque = TagIds.from_mapping(dict(zip(TAGS, range(1, 11), strict=True)), newline=NEWLINE, colon=COLON)
    assert _pairs(extract_units(played.ids, opaque, played.prompt_length)) == played.units


@given(simulated(depth=3))
def test_each_token_is_in_one_completion_or_is_glue(played: Simulated) -> None:
    units = extract_units(played.ids, TAG_IDS, played.prompt_length)
    threads = sum(context[-1:].tolist() == [COLON] and T in context[-8:].tolist() for context, _ in units)
    generated = sum(len(completion) for _, completion in units)
    headers = [
        TAG_IDS.label(n) for u in units for n in fork_numbers([*u.context, *u.completion], TAG_IDS, len(u.context))
    ]
    assert threads >= len(headers)
    blocks = played.num_blocks
    glue = sum(map(len, headers)) + len(headers) + 2 * blocks  # <Thread>s, first newlines and join newlines
    assert generated + glue == len(played.ids) - played.prompt_length


def test_threads_never_see_each_other() -> None:
    ids = [*_outlines(ONE, TWO), NEWLINE, *_thread(ONE, 101), *_thread(TWO, 102), NEWLINE, P_]
    _, first, second, join = _pairs(extract_units(ids, TAG_IDS, 0))
    assert first == ([*_outlines(ONE, TWO), NEWLINE, T, NEWLINE, ONE, COLON], [101, T_])
    assert second == ([*_outlines(ONE, TWO), NEWLINE, T, NEWLINE, TWO, COLON], [102, T_])
    assert join == (ids[:-1], [P_])


def test_joined_copies_and_glue_carry_no_loss() -> None:
    """The published SFT code trains every token after the prompt and the joined copies again (SPEC section 2)."""
    ids = [*_outlines(ONE, TWO), NEWLINE, *_thread(ONE, 101), *_thread(TWO, 102), NEWLINE, P_]
    completions = [token for _, completion in extract_units(ids, TAG_IDS, 0) for token in completion.tolist()]
    assert completions == [*_outlines(ONE, TWO), 101, T_, 102, T_, P_]


def test_duplicate_outlines_collapse_to_the_first() -> None:
    ids = [*_outlines(ONE, TWO, ONE), NEWLINE, *_thread(ONE), *_thread(TWO), NEWLINE, P_]
    assert [len(u.completion) for u in extract_units(ids, TAG_IDS, 0)] == [len(_outlines(ONE, TWO, ONE)), 1, 1, 1]


def test_stale_outlines_are_never_used_again() -> None:
    """The published controller forks on a stray </Outlines> with the outlines of an earlier block."""
    ids = [*_outlines(ONE), NEWLINE, *_thread(ONE), NEWLINE, P_, OS_, NEWLINE, *_thread(ONE, 101)]
    assert _pairs(extract_units(ids, TAG_IDS, 0))[-1][1] == [P_, OS_, NEWLINE, *_thread(ONE, 101)]


def test_tags_in_the_prompt_are_text() -> None:
    block = [*_outlines(ONE), NEWLINE, *_thread(ONE, 101), NEWLINE, P_]
    assert _pairs(extract_units([*block, 105], TAG_IDS, len(block))) == [(block, [105])]


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([100, 101], id="no_block"),
        pytest.param([P, T, NEWLINE, ONE, COLON, T_, P_], id="no_outlines"),
        pytest.param([P, OS, OL, 100, OL_, OS_, NEWLINE, *_thread(ONE), P_], id="outline_without_number"),
        pytest.param([*_outlines(ONE), *_thread(ONE, 101), NEWLINE, P_], id="header_without_newline"),
        pytest.param([*_outlines(ONE), NEWLINE, *_thread(TWO, 101), NEWLINE, P_], id="header_of_another_number"),
        pytest.param([*_outlines(ONE)], id="cut_after_the_outlines"),
        pytest.param([P, OS, OL, ONE, COLON, OS_, NEWLINE, *_thread(ONE)], id="unclosed_outline"),
    ],
)
def test_ids_that_no_engine_forked_are_one_sequential_unit(ids: list[int]) -> None:
    assert _pairs(extract_units([50, *ids], TAG_IDS, 1)) == [([50], ids)]


def test_a_header_that_does_not_match_ends_the_fork() -> None:
    ids = [*_outlines(ONE, TWO), NEWLINE, *_thread(ONE, 101), T, NEWLINE, ONE, COLON, 102, T_, P_]
    fork = len(_outlines(ONE, TWO))
    assert [u.completion.tolist() for u in extract_units(ids, TAG_IDS, 0)] == [ids[:fork], [101, T_], ids[fork + 7 :]]


@pytest.mark.parametrize("cut", range(1, 6))
def test_an_unterminated_thread_goes_on_to_the_end(cut: int) -> None:
    ids = [*_outlines(ONE), NEWLINE, T, NEWLINE, ONE, COLON, *[101] * cut]
    assert _pairs(extract_units(ids, TAG_IDS, 0))[-1] == (ids[:-cut], [101] * cut)


def test_a_thread_that_wrote_nothing_has_no_unit() -> None:
    ids = [*_outlines(ONE), NEWLINE, T, NEWLINE, ONE, COLON]
    assert len(extract_units(ids, TAG_IDS, 0)) == 1
    assert extract_units([], TAG_IDS, 0) == []


def test_a_forced_thread_close_counts_as_written() -> None:
    ids = [*_outlines(ONE), NEWLINE, *_thread(ONE, 101, NEWLINE), *TAG_IDS.forced_block_close]
    assert [u.completion.tolist() for u in extract_units(ids, TAG_IDS, 0)][1:] == [[101, NEWLINE, T_], [P_]]


def test_flat_format_leaves_blocks_in_threads_as_text() -> None:
    inner = [*_outlines(ONE), NEWLINE, *_thread(ONE, 101), NEWLINE, P_]
    ids = [*_outlines(ONE), NEWLINE, *_thread(ONE, *inner), NEWLINE, P_]
    assert len(extract_units(ids, TAG_IDS, 0)) == 5
    flat = extract_units(ids, TAG_IDS, 0, nested=False)
    assert flat[1].completion.tolist() == [*_outlines(ONE), NEWLINE, *_thread(ONE, 101)]


@given(tag_soups)
def test_any_ids_have_units_that_tile_the_response(text: str) -> None:
    ids = CharTokenizer().encode(text)
    units = extract_units(ids, TagIds.from_tokenizer(CharTokenizer()), 0)
    assert sum(len(u.completion) for u in units) <= len(ids)
    if len(units) == 1:
        assert units[0].completion.tolist() == ids


def test_deep_nesting_needs_no_recursion() -> None:
    depth = 1500
    ids = [*_outlines(ONE), NEWLINE, T, NEWLINE, ONE, COLON] * depth + [T_, NEWLINE, P_] * depth
    assert len(extract_units(ids, TAG_IDS, 0)) == 2 * depth + 1


def test_missing_glue_is_named_only_when_it_is_needed() -> None:
    bare = TagIds.from_mapping(dict(zip(TAGS, range(1, 11), strict=True)))
    assert len(extract_units([100, P, T, T_, P_], bare, 0)) == 1
    with pytest.raises(GrammarError, match=r"TagIds has no colon, .*pass colon="):
        extract_units([*_outlines(ONE), NEWLINE, *_thread(ONE)], bare, 0)


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        ([1, -2], 0, r"token_ids must not be negative, got -2 at index 1"),
        ([0.5], 0, r"token_ids must hold integers, got dtype float64"),
        ([[1]], 0, r"token_ids must have shape \(L,\), got \(1, 1\)"),
        ([1], 2, r"prompt_length must be within 0..1 .*, got 2"),
        ([1], -1, r"prompt_length must be within 0..1 .*, got -1"),
    ],
)
def test_bad_input_is_named(ids: list[object], length: int, message: str) -> None:
    with pytest.raises(TrieError, match=message):
        extract_units(ids, TAG_IDS, length)


def test_unit_is_a_pair_equal_by_value() -> None:
    unit = Unit([1, 2], np.array([3], dtype=np.int32))
    context, completion = unit
    assert context.dtype == completion.dtype == np.int64
    assert unit == Unit((1, 2), [3])
    assert unit != Unit([1], [2, 3])
    assert len({unit, Unit([1, 2], [3])}) == 1
    with pytest.raises(TrieError, match=r"completion must hold integers"):
        Unit([1], [1.5])
