"""Measures of rows equal those of tw_core; what is not known is None, with the reason."""

import pytest

from tests.support.rollouts import FORKED, text_engine
from tests.support.sft import byte_tokenizer
from tw_core import TAGS, TagIds, encode_units, parallel_stats
from tw_recipes.decoding import ForkJoinDecoder, Limits
from tw_recipes.rollout import trajectory_row
from tw_recipes.sft.rows import row_to_trie
from tw_recipes.viewer.entries import Entry
from tw_recipes.viewer.measures import measure


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.fixture(scope="module")
def tags(tokenizer):
    return TagIds.from_tokenizer(tokenizer)


def test_text_is_measured_at_the_seams_of_inference(tokenizer, tags):
    row = {"prompt": "q", "text": FORKED}
    found = measure(Entry("1", "q", FORKED, row), tokenizer, tags)
    units = encode_units(FORKED, tokenizer, "q")
    stats = parallel_stats([*units[-1].context, *units[-1].completion], tags, prompt_length=len(units[0].context))
    assert (found.total_tokens, found.token_latency) == (stats.total_tokens, stats.critical_path_tokens)
    assert found.acceleration == pytest.approx(stats.acceleration)
    assert (found.blocks, found.threads, found.well_formed, found.problems) == (1, 2, True, ())
    want = row_to_trie(row, tokenizer)
    assert (found.trie.num_tokens, found.trie.sharing_ratio) == (want.num_tokens, want.sharing_ratio)


def test_a_rollout_keeps_what_was_recorded(tokenizer, tags):
    decoder = ForkJoinDecoder(text_engine(tokenizer), tags)
    (rollout,) = decoder.decode_all([tokenizer.encode("q")])
    row = trajectory_row(rollout, tokenizer)
    found = measure(Entry("k", "q", row["text"], row))
    assert found.total_tokens == row["stats"]["total_tokens"]
    assert found.token_latency == row["token_latency"]
    assert (found.blocks, found.threads, found.well_formed) == (1, 2, True)
    assert found.status.startswith("done")
    assert found.trie.num_sequences == 4
    slim = {name: value for name, value in row.items() if name not in ("units", "logprobs")}
    assert measure(Entry("k", "q", row["text"], slim)).no_trie == "a rollout without units needs --tokenizer"
    again = measure(Entry("k", "q", row["text"], slim), tokenizer, tags).trie
    assert (again.num_tokens, again.num_sequences) == (found.trie.num_tokens, 4)


def test_closers_that_were_forced_are_a_problem(tokenizer, tags):
    """A row holds their number; it was read as a list of tags, so that a rollout past its budget could not be shown."""
    decoder = ForkJoinDecoder(text_engine(tokenizer), tags, Limits(max_total_tokens=len(FORKED) // 2))
    (rollout,) = decoder.decode_all([tokenizer.encode("q")])
    assert rollout.forced
    row = trajectory_row(rollout, tokenizer)
    found = measure(Entry("k", "q", row["text"], row))
    assert not found.well_formed
    assert found.problems[-1] == f"closers that the decoder had to add: {rollout.forced}"
    broken = row | {"problems": [[3, "gap", "at 3: no"]]}
    assert measure(Entry("k", "q", row["text"], broken)).problems[0] == "token 3: at 3: no"


def test_text_may_nest_deeper_than_the_stack_of_python():
    text = "<Parallel><Thread>" * 2000
    found = measure(Entry("1", "", text, {"text": text}))
    assert (found.blocks, found.threads, found.well_formed) == (2000, 2000, False)


def test_text_without_a_tokenizer_has_a_format_and_a_structure():
    found = measure(Entry("1", "", FORKED, {"text": FORKED}))
    assert (found.total_tokens, found.acceleration, found.blocks, found.threads) == (None, None, 1, 2)
    assert (found.trie, found.no_trie) == (None, "text needs --tokenizer")
    assert found.shown() == {"blocks": 1, "threads": 2}


def test_scores_of_reinforcement_learning_are_shown():
    row = {"text": "7", "rewards": {"correctness": 1.0, "format": None}, "advantage": -0.25}
    assert measure(Entry("1", "", "7", row)).shown() == {
        "blocks": 0,
        "threads": 0,
        "correctness": 1.0,
        "advantage": -0.25,
    }


def test_malformed_text_is_measured_and_its_problems_have_places(tokenizer, tags):
    text = FORKED.replace("</Parallel>", "")
    found = measure(Entry("1", "", text, {"text": text}), tokenizer, tags)
    assert not found.well_formed
    assert found.problems[0].startswith(f"character {len(text)}: expected </Parallel>")
    assert found.total_tokens == len(tokenizer.encode(text, add_special_tokens=False))
    assert found.trie is None
    assert "malformed fork/join text" in found.no_trie


def test_units_that_end_inside_a_block_have_no_length(tokenizer, tags):
    """The last call has not seen the other threads: T and L from it would be too short."""
    units = [[u.context.tolist(), u.completion.tolist()] for u in encode_units(FORKED, tokenizer, "q")]
    whole = measure(Entry("1", "q", FORKED, {"units": units}), tokenizer, tags)
    assert whole.total_tokens == measure(Entry("1", "q", FORKED, {"text": FORKED}), tokenizer, tags).total_tokens
    cut = [*units[:2], [units[2][0], units[2][1][:-2]]]
    text = tokenizer.decode([*cut[-1][0], *cut[-1][1]][len(units[0][0]) :])
    found = measure(Entry("1", "q", text, {"units": cut}), tokenizer, tags)
    assert (found.total_tokens, found.token_latency) == (None, None)
    assert found.trie.num_sequences == 3


def test_sequences_are_a_trie_alone():
    found = measure(Entry("1", "", None, {"sequences": [[1, 2, 3], [1, 2, 4]]}))
    assert (found.well_formed, found.blocks, found.trie.num_tokens) == (None, None, 4)
    assert found.shown() == {"rows": 4, "r": 1.5}
