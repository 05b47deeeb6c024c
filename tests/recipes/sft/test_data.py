"""Offline packing: every row format, chat templates, problems by kind, exact splitting, statistics, caching."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset

from tests.support.models import tiny_model
from tests.support.sft import byte_tokenizer, trajectories
from tests.support.text import CHAIN_ROWS, FORK_ROWS, MALFORMED_ROW
from tests.support.tries import expanded_loss
from tw_core import encode_units
from tw_recipes import TrieCollator, add_tag_tokens, install, prepare_dataset
from tw_recipes.sft import RowError, data
from tw_recipes.sft.rows import chat_turns, row_to_trie, text_units
from tw_recipes.tokens import TagTokenError


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    add_tag_tokens(tiny_model("qwen3", vocab_size=272), tokenizer)
    return tokenizer


def _targets(batch):
    return int(batch["labels"].numel())


def test_text_rows_train_what_the_model_writes(tokenizer):
    row = FORK_ROWS[0]
    units = text_units(row["prompt"], row["text"], tokenizer)
    assert len(units) == 4  # opening, two threads, the join and the rest
    expected = encode_units(row["text"], tokenizer, prompt=row["prompt"])
    assert [unit.completion.tolist() for unit in units[:-1]] == [unit.completion.tolist() for unit in expected[:-1]]
    assert units[-1].completion.tolist() == [*expected[-1].completion.tolist(), tokenizer.eos_token_id]
    batch = TrieCollator(tokenizer)([row])
    assert _targets(batch) == sum(len(unit.completion) for unit in units)
    explicit = row | {"text": row["text"] + tokenizer.eos_token}
    assert torch.equal(TrieCollator(tokenizer)([explicit])["labels"], batch["labels"])


def test_messages_use_the_chat_template(tokenizer):
    row = FORK_ROWS[1]
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["text"]}]
    rendered = {"prompt": f"<|user|>{row['prompt']}<|end|><|assistant|>", "text": row["text"]}
    expected = TrieCollator(tokenizer)([rendered])
    for name, tensor in TrieCollator(tokenizer)([{"messages": chat}]).items():
        assert torch.equal(tensor, expected[name]), name


def test_every_assistant_turn_is_trained_from_its_own_context(tokenizer):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second", "reasoning_content": "because"},
    ]
    turns = chat_turns(chat, tokenizer)
    assert turns[0] == ("<|user|>one<|end|><|assistant|>", "first")
    assert turns[1][0] == "<|user|>one<|end|><|assistant|>first<|end|><|user|>two<|end|><|assistant|>"
    assert turns[1][1] == "<think>\nbecause\n</think>\n\nsecond"
    trie = row_to_trie({"messages": chat}, tokenizer)
    assert trie.num_tokens < trie.num_expanded_tokens


def test_a_template_that_opens_the_reasoning_is_not_doubled(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", tokenizer.chat_template.replace("<|assistant|>{%", "<|assistant|><think>\n{%")
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}]
    assert chat_turns(chat, tokenizer) == [("<|user|>q<|end|><|assistant|><think>\n", "a\n</think>\n\nb")]


def test_tags_in_the_question_are_not_structure(tokenizer):
    question = "Explain <Parallel><Outlines> and </Thread>, please. "
    with_tags = row_to_trie({"prompt": question, "text": CHAIN_ROWS[0]["text"]}, tokenizer)
    assert with_tags.num_sequences == 1
    forked = row_to_trie({"prompt": question, "text": FORK_ROWS[0]["text"]}, tokenizer)
    assert forked.num_sequences == 4


def test_statistics_and_packing(tokenizer, capsys):
    rows = Dataset.from_list([*FORK_ROWS, *CHAIN_ROWS])
    packed, statistics = prepare_dataset(rows, tokenizer, max_tokens=700)
    assert statistics.samples == 9
    assert statistics.sequences == 4 * len(FORK_ROWS) + len(CHAIN_ROWS)
    assert statistics.forests == len(packed) < 9
    assert statistics.tokens == sum(len(row["input_ids"]) for row in packed)
    assert all(len(row["input_ids"]) <= 700 for row in packed)
    assert statistics.expanded_tokens == sum(
        len(unit.context) + len(unit.completion)
        for row in rows
        for unit in text_units(row["prompt"], row["text"], tokenizer)
    )
    assert 1.5 < statistics.sharing_ratio < 4
    assert statistics.targets == sum(_targets(TrieCollator()([row])) for row in packed)
    again, same = prepare_dataset(packed, tokenizer, max_tokens=700)
    assert again is packed
    assert (same.tokens, same.targets) == (statistics.tokens, statistics.targets)


def test_several_processes_give_the_same_rows(tokenizer):
    rows = Dataset.from_list(FORK_ROWS)
    one, _ = prepare_dataset(rows, tokenizer, max_tokens=2000, batch_size=3)
    two, _ = prepare_dataset(rows, tokenizer, max_tokens=2000, batch_size=3, num_proc=2)
    assert one.to_list() == two.to_list()


def test_a_second_run_on_the_same_file_packs_nothing(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FORK_ROWS))
    first, _ = prepare_dataset(_loaded(file), tokenizer, max_tokens=700)
    packed = []
    monkeypatch.setattr(data, "row_to_trie", lambda *found: packed.append(found) or row_to_trie(*found))
    again, _ = prepare_dataset(_loaded(file), tokenizer, max_tokens=700)
    assert again.to_list() == first.to_list()
    assert not packed
    prepare_dataset(_loaded(file), tokenizer, max_tokens=800)
    assert len(packed) == len(FORK_ROWS)


def _loaded(file):
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent / "cache"))


def test_problems_stop_or_are_counted_by_kind(tokenizer):
    rows = Dataset.from_list([MALFORMED_ROW, *FORK_ROWS, MALFORMED_ROW])
    with pytest.raises(RowError, match=r"2 of 8 samples cannot be trained on \(.*\); row 1: .*drop_invalid=True"):
        prepare_dataset(rows, tokenizer, max_tokens=2000)
    packed, statistics = prepare_dataset(rows, tokenizer, max_tokens=2000, drop_invalid=True, batch_size=1)
    assert sum(statistics.problems.values()) == 2
    assert len(packed) == len(FORK_ROWS)
    assert "6 of 8 samples used" in str(statistics)
    assert "2 samples dropped: " in str(statistics)


def test_a_budget_below_the_shortest_unit_is_refused(tokenizer):
    with pytest.raises(RowError, match=r"overlong 6.*max_tokens=8.*max_length in TrieSFTConfig.*none would be left"):
        prepare_dataset(Dataset.from_list(FORK_ROWS), tokenizer, max_tokens=8, drop_invalid=True)


def test_long_samples_are_split_exactly():
    samples = trajectories(4, 6, seed=2)
    longest = max(len(context) + len(completion) for sample in samples for context, completion in sample)
    packed, statistics = prepare_dataset(Dataset.from_dict({"units": samples}), max_tokens=longest, pack_samples=False)
    assert statistics.split_samples > 0
    assert max(len(row["input_ids"]) for row in packed) <= longest
    model = tiny_model("qwen3")
    expected = sum(expanded_loss(model, sample).item() for sample in samples)
    install(model)
    total = 0.0
    for row in packed:
        batch = TrieCollator()([row])
        labels = batch.pop("labels")
        batch.pop("shift_labels")
        logits = model(**batch, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
    assert total == pytest.approx(expected, rel=1e-5)


def test_groups_of_sequences_with_masks():
    rows = Dataset.from_dict({"sequences": [[[4, 5, 6], [4, 5, 7]]], "loss_masks": [[[0, 0, 1], [0, 0, 1]]]})
    packed, statistics = prepare_dataset(rows, max_tokens=10)
    assert np.asarray(packed[0]["target_ids"]).tolist() == [6, 7]
    assert statistics.sharing_ratio == 1.5


def test_bad_data_sets_are_refused(tokenizer):
    rows = Dataset.from_list(FORK_ROWS)
    with pytest.raises(RowError, match=r"expected columns .*got \['answer', 'question'\]; rename"):
        prepare_dataset(Dataset.from_dict({"question": ["a"], "answer": ["b"]}), tokenizer, max_tokens=10)
    with pytest.raises(TagTokenError, match="lacks the tags <Parallel>"):
        prepare_dataset(rows, byte_tokenizer(), max_tokens=10)
    with pytest.raises(RowError, match="rows of text or messages need a tokenizer"):
        prepare_dataset(rows, max_tokens=10)
    with pytest.raises(TypeError, match="load it without streaming"):
        prepare_dataset(IterableDataset.from_generator(lambda: iter(FORK_ROWS)), tokenizer, max_tokens=10)
    with pytest.raises(RowError, match="no assistant turn"):
        row_to_trie({"messages": [{"role": "user", "content": "hi"}]}, tokenizer)
    with pytest.raises(RowError, match="the data set has no row; check the file and the split"):
        prepare_dataset(rows.select([]), tokenizer, max_tokens=10)
    with pytest.raises(ValueError, match=r"max_tokens must be an int >= 1 .*, got None"):
        prepare_dataset(rows, tokenizer, max_tokens=None)
    empty = Dataset.from_dict({"sequences": [[[4, 5]]], "loss_masks": [[[0, 0]]]})
    with pytest.raises(RowError, match="no_targets 1"):
        prepare_dataset(empty, max_tokens=10)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "chat_template", "refuses the 0 turns before"),
        ({"messages": [{"content": "a"}]}, "messages", "must be a list of turns"),
        ({"messages": "a"}, "messages", "must be a list of turns"),
        ({"prompt": [{"role": "user", "content": "q"}], "text": "a"}, "prompt", "prompt must be a string, got list"),
        ({"prompt": "q", "text": 7}, "text", "text must be a string, got int"),
    ],
)
def test_a_bad_row_is_a_row_error(tokenizer, row, kind, message):
    with pytest.raises(RowError, match=message) as found:
        row_to_trie(row, tokenizer)
    assert found.value.kind == kind


def test_bad_rows_among_good_ones_are_dropped_and_counted(tokenizer):
    """A unit that is no pair, and a chat that its template refuses, ended the run whatever drop_invalid said."""
    units = Dataset.from_dict({"units": [[[[4], [5]]], [[[4]]]]})
    _, statistics = prepare_dataset(units, max_tokens=10, drop_invalid=True)
    assert statistics.problems == {"TrieError": 1}
    question, answer = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    chats = Dataset.from_dict({"messages": [[question, answer], [answer]]})
    _, statistics = prepare_dataset(chats, tokenizer, max_tokens=100, drop_invalid=True)
    assert statistics.problems == {"chat_template": 1}
