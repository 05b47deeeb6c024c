"""TrieCollator: the wire format, weights as repetitions, padding, and its errors."""

import numpy as np
import pytest
import torch

from tw_core import ReasoningTrie
from tw_core.errors import BudgetError, ShapeError
from tw_recipes import TrieCollator
from tw_recipes.sft.collator import packed_columns

CHAIN = {"sequences": [[5, 6, 7]]}
FORK = {"units": [[[5, 6], [7, 8]], [[5, 6], [9]], [[5, 6], [9]]]}


def test_a_fork_by_hand():
    batch = TrieCollator(count_logical_tokens=True)([FORK])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["subtree_end"].tolist() == [[5, 5, 4, 4, 5]]
    # row 1 predicts 7 once and 9 twice, row 2 predicts 8
    pairs = sorted(zip(batch["target_rows"][0].tolist(), batch["shift_labels"][0].tolist(), strict=True))
    assert pairs == [(1, 7), (1, 9), (1, 9), (2, 8)]
    assert torch.equal(batch["labels"], batch["shift_labels"])
    assert batch["num_logical_tokens"].tolist() == [[10]]
    assert batch["subtree_end"].dtype == torch.int32
    assert all(not tensor.is_floating_point() for tensor in batch.values())


def test_rows_are_concatenated_into_a_forest():
    batch = TrieCollator()([CHAIN, FORK, CHAIN])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 2, 0, 1, 2]]
    assert batch["subtree_end"].tolist() == [[3, 3, 3, 8, 8, 7, 7, 8, 11, 11, 11]]
    assert sorted(batch["target_rows"][0].tolist()) == [0, 1, 4, 4, 4, 5, 8, 9]
    assert "num_logical_tokens" not in batch


def test_packed_columns_give_the_same_batch():
    row = packed_columns(ReasoningTrie.from_sequences(CHAIN["sequences"]).pack())
    stored = {name: np.asarray(value).tolist() for name, value in row.items()}
    for found, expected in zip(TrieCollator()([stored]).values(), TrieCollator()([CHAIN]).values(), strict=True):
        assert torch.equal(found, expected)


def test_padding_rows_see_only_themselves():
    batch = TrieCollator(pad_to_multiple_of=8)([CHAIN])
    assert batch["input_ids"].shape == (1, 8)
    assert batch["subtree_end"].tolist() == [[3, 3, 3, 4, 5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch["target_rows"].tolist() == [[0, 1]]


def test_bad_batches_are_refused():
    with pytest.raises(BudgetError, match="a batch of 2 samples has 6 rows, more than max_tokens=5"):
        TrieCollator(max_tokens=5)([CHAIN, CHAIN])
    with pytest.raises(ShapeError, match="no row of the batch has a target"):
        TrieCollator()([{"sequences": [[5, 6]], "loss_masks": [[0, 0]]}])
    with pytest.raises(ShapeError, match=r"lacks the columns \['target_rows'.*remove_unused_columns=False"):
        TrieCollator()([{"input_ids": [1], "position_ids": [0], "subtree_end": [1]}])
    with pytest.raises(ValueError, match=r"expected columns .*messages.*, got \['question'\]"):
        TrieCollator()([{"question": "?"}])
    with pytest.raises(ValueError, match="rows with 'text' need a tokenizer"):
        TrieCollator()([{"prompt": "a", "text": "b"}])
    with pytest.raises(ShapeError, match="rows is empty; pass at least one row"):
        TrieCollator()([])
    with pytest.raises(ValueError, match="pad_to_multiple_of must be >= 1, got 0"):
        TrieCollator(pad_to_multiple_of=0)
