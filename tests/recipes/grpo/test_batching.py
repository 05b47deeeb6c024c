"""Groups stay together in micro-batches, whatever their sizes, and the random state is that of TRL's shuffle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import shuffle_sequence_dict

from tests.support.grpo import GROUP, make_trainer, train
from tw_recipes.grpo.batching import grouped_order, prompt_groups


@st.composite
def _batches(draw):
    """(groups, permutation, number of runs), groups of any sizes in any order."""
    runs, size = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    groups = draw(st.lists(st.integers(0, 5), min_size=runs * size, max_size=runs * size))
    return groups, draw(st.permutations(range(runs * size))), runs


@given(_batches())
def test_the_order_is_a_permutation_that_tears_no_more_than_it_must(batch):
    groups, permutation, runs = batch
    order = grouped_order(groups, permutation, runs)
    assert sorted(order) == list(range(len(groups)))
    size = len(groups) // runs
    parts = sum(len({groups[row] for row in order[at : at + size]}) for at in range(0, len(groups), size))
    needed = sum(-(-groups.count(group) // size) for group in set(groups))
    # Best fit decreasing divides a group only where no run has room for it: at most once a run beside the last.
    assert needed <= parts <= needed + runs - 1


def test_equal_groups_are_never_torn():
    groups = [group for group in range(8) for _ in range(4)]
    order = grouped_order(groups, torch.randperm(32).tolist(), 4)
    for at in range(0, 32, 8):
        found = [groups[row] for row in order[at : at + 8]]
        assert all(found.count(group) == 4 for group in found)


def test_groups_and_their_members_are_shuffled():
    groups = [group for group in range(4) for _ in range(4)]
    orders = {tuple(grouped_order(groups, torch.randperm(16).tolist(), 4)) for _ in range(20)}
    assert len({order[0] // 4 for order in orders}) > 1
    assert len(orders) == 20


def test_rows_that_were_removed_are_named():
    with pytest.raises(ValueError, match="has 7 rows, not a multiple of steps_per_generation=2; keep rows"):
        grouped_order([0] * 7, list(range(7)), 2)


def test_prompts_are_told_apart_by_their_tokens():
    ids = torch.tensor([[9, 5, 6], [0, 5, 6], [0, 5, 6], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]])
    groups = prompt_groups(ids, mask)
    assert groups[1] == groups[2]
    assert len(set(groups)) == 3


@pytest.mark.parametrize("size", [2, GROUP, 6])
def test_every_micro_batch_shares(size, tmp_path):
    steps = 2 * 3 * GROUP // size
    trainer = make_trainer(
        "trie",
        tmp_path,
        prompts=[f"prompt number {i}" for i in range(6)],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
    )
    _, metrics = train(trainer)
    shared = [len(set(prompt_groups(b["prompt_ids"], b["prompt_mask"]))) for b in trainer._buffered_inputs]
    assert len(shared) == steps
    assert sum(shared) == {2: 12, GROUP: 6, 6: 8}[size]
    assert metrics[0]["sharing_ratio"] > 1.2


def test_the_random_state_left_behind_is_that_of_trl(tmp_path):
    trainer = make_trainer("trie", tmp_path)
    batch = {"prompt_ids": torch.arange(8).view(8, 1) // 4, "prompt_mask": torch.ones(8, 1), "count": torch.tensor(3)}
    torch.manual_seed(5)
    shuffle_sequence_dict(batch)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (found,) = trainer._split_batch(batch | {"names": [*"abcdefgh"], "none": None})
    assert torch.equal(torch.rand(3), expected)
    assert found["count"] == 3
    assert found["none"] is None
    assert [found["names"].index(name) // 4 for name in "abcd"].count(found["names"].index("a") // 4) == 4
