"""parallel_stats: the recorded figures, the played engine's critical path, nesting."""

import json
from pathlib import Path

import pytest
from hypothesis import given

from tests.support.trajectories import TAG_IDS, CharTokenizer, Simulated, simulated, tag_soups
from tw_core import ParallelStats, TagIds, TrieError, parallel_stats

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "stats_cases.json").read_text())
GOLDEN_TAGS = TagIds.from_mapping(GOLDEN["meta"]["tag_ids"])
FIELDS = GOLDEN["meta"]["fields"]
P, P_, T, T_ = 1, 2, 7, 8


def _flat_fields(stats: ParallelStats) -> dict[str, float]:
    """Our measures under the names of the recorded ones."""
    return {
        "total_num_tokens": stats.total_tokens,
        "num_tokens_in_the_longest_thread": stats.critical_path_tokens,
        "with_parallel": stats.with_parallel,
        "parallel_count": stats.num_blocks,
        "parallel_ratio": stats.parallel_ratio,
        "acceleration_ratio": stats.acceleration,
        "avg_tokens_per_parallel_block": stats.tokens_per_block,
        "thread_counts_per_block": stats.threads_per_block,
    }


def _has_nested_block(ids: list[int]) -> bool:
    return parallel_stats(ids, GOLDEN_TAGS).max_depth > 1


@pytest.mark.parametrize("place", range(len(GOLDEN["cases"])))
def test_recorded_cases(place: int) -> None:
    """All match in the flat format; with nesting all but those with a block inside a thread."""
    case = dict(zip(FIELDS, GOLDEN["cases"][place], strict=True))
    ids = case["token_ids"]
    for nested in (False, True) if not _has_nested_block(ids) else (False,):
        measured = _flat_fields(parallel_stats(ids, GOLDEN_TAGS, nested=nested))
        assert measured == pytest.approx({name: case[name] for name in measured}, rel=1e-12)


def test_enough_recorded_cases_have_no_nested_block() -> None:
    assert sum(not _has_nested_block(case[1]) for case in GOLDEN["cases"]) >= 150


@given(simulated(depth=3))
def test_critical_path_of_a_played_engine(played: Simulated) -> None:
    stats = parallel_stats(played.ids, TAG_IDS, prompt_length=played.prompt_length)
    assert stats.total_tokens == len(played.ids) - played.prompt_length
    assert stats.critical_path_tokens == played.critical_path
    assert stats.num_blocks == played.num_blocks


@given(tag_soups)
def test_any_ids_have_stats_within_bounds(text: str) -> None:
    tokenizer = CharTokenizer()
    ids = tokenizer.encode(text)
    stats = parallel_stats(ids, TagIds.from_tokenizer(tokenizer))
    assert 0 <= stats.critical_path_tokens <= stats.total_tokens == len(ids)
    assert 0 <= stats.acceleration < 1
    assert 0 <= stats.parallel_ratio <= 1


def test_nested_blocks_recurse() -> None:
    inner = [P, T, 101, 101, T_, T, 102, T_, P_]  # 9 tokens, 8 on its critical path
    stats = parallel_stats([100, P, T, *inner, T_, T, *[103] * 5, T_, P_, 100], TAG_IDS)
    # Outside threads: 100, P, T, T_, T, T_, P_, 100; the longest thread is the inner block: 8.
    assert stats.critical_path_tokens == 8 + 8
    assert stats.total_tokens == 22
    assert stats == (22, 16, 1 - 16 / 22, 18 / 22, 2, 4, 2.0, (18 + 7) / 2, 2)


def test_the_prompt_is_not_measured() -> None:
    """The published reward measures prompt and response together, tags of the prompt included."""
    prompt, response = [P, T, 101], [100, P, T, 101, T_, P_]
    assert parallel_stats(prompt + response, TAG_IDS, prompt_length=3) == parallel_stats(response, TAG_IDS)


@pytest.mark.parametrize("length", [-1, 2])
def test_prompt_length_is_checked(length: int) -> None:
    with pytest.raises(TrieError, match=rf"prompt_length must be within 0..1 .*, got {length}"):
        parallel_stats([100], TAG_IDS, prompt_length=length)
