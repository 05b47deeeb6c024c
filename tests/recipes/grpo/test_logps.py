"""Rows -> tries -> log-probs in their places: the layout by laws, the values and gradients against plain forwards."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trl import GRPOTrainer

from tests.support.grpo import GROUP, branching_rollouts, make_trainer, token_reward, train
from tests.support.tries import gradients, largest_error
from tw_core import BudgetError
from tw_recipes.grpo.layout import idle_forward, plan_forwards, scored_sequences

MOVING = {"num_iterations": 2, "learning_rate": 3e-1, "epsilon": 0.02}


def _path(parents, token):
    path = []
    while token >= 0:
        path.append(token)
        token = parents[token]
    return path[::-1]


@st.composite
def _rows(draw):
    """Padded rows with small vocabularies (so that rows share), random trees and random masks of what is scored."""
    count, prompt, length = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 10_000))
    rng = random.Random(seed)
    ids = torch.tensor([[rng.randrange(1, 4) for _ in range(prompt + length)] for _ in range(count)])
    mask, parents = torch.zeros(count, prompt + length, dtype=torch.int64), torch.full((count, length), -2)
    for row in range(count):
        size = rng.randint(0, length)
        mask[row, prompt - rng.randint(1, prompt) : prompt + size] = 1
        for token in range(size):
            parents[row, token] = token - 1 if rng.random() < 0.7 else rng.randint(-1, token - 1)
    generated = torch.tensor([[rng.random() < 0.7 for _ in range(length)] for _ in range(count)])
    return ids, mask, length, parents, generated.long()


@given(_rows(), st.integers(14, 40))
def test_every_scored_token_has_one_place_and_its_own_history(rows, budget):
    ids, mask, length, parents, generated = rows
    sequences = scored_sequences(ids, mask, length, parents, generated)
    forwards = plan_forwards(sequences, budget)
    start = ids.shape[1] - length
    expected = {}
    for row in range(ids.shape[0]):
        prompt = ids[row, :start][mask[row, :start] == 1].tolist()
        for token in torch.nonzero(mask[row, start:] * generated[row])[:, 0].tolist():
            history = prompt + ids[row, start:][_path(parents[row].tolist(), token)].tolist()
            expected[row * length + token] = history
    found = {}
    for forward in forwards:
        assert forward.packed.num_rows <= budget
        for target, slot in zip(forward.targets.tolist(), forward.slots.tolist(), strict=True):
            assert slot not in found
            child = int(forward.packed.target_children[target])
            above = torch.nonzero(forward.packed.subtree_end[: child + 1] > child)[:, 0]
            found[slot] = forward.packed.input_ids[above].tolist()
    assert found == expected


@given(_rows())
def test_within_the_budget_equal_histories_are_scored_once(rows):
    sequences = scored_sequences(*rows)
    for forward in plan_forwards(sequences, 10_000):
        assert forward.packed.target_rows.numel() == forward.targets.unique().numel()
        histories = {
            tuple(tokens[: at + 1].tolist())
            for tokens, own in zip(sequences.tokens, sequences.masks, strict=True)
            for at in np.flatnonzero(own)
        }
        assert forward.packed.target_rows.numel() == len(histories)


def test_a_chain_is_the_tree_without_a_branch():
    ids = torch.tensor([[0, 7, 8, 4, 5, 6], [9, 7, 8, 4, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    chain = scored_sequences(ids, mask, 3)
    tree = scored_sequences(ids, mask, 3, torch.tensor([[-1, 0, 1], [-1, -2, -2]]))
    for one, other in ((chain.tokens, tree.tokens), (chain.masks, tree.masks), (chain.slots, tree.slots)):
        assert [x.tolist() for x in one] == [x.tolist() for x in other]
    assert [x.tolist() for x in chain.tokens] == [[7, 8, 4, 5, 6], [9, 7, 8, 4]]
    assert [x.tolist() for x in chain.slots] == [[0, 1, 2], [3]]


def test_prompts_share_their_common_beginning():
    ids = torch.tensor([[5] * 20 + [1, 2, 3], [5] * 20 + [1, 4, 3], [5] * 19 + [6] + [1, 2, 3]])
    (forward,) = plan_forwards(scored_sequences(ids, torch.ones_like(ids), 3), 1000)
    assert forward.packed.num_rows == 20 + 3 + 2 + 4


def test_rows_without_a_scored_token_cost_nothing():
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    assert len(scored_sequences(ids, mask, 3).tokens) == 1
    nothing = scored_sequences(ids, mask, 3, generated=torch.zeros(2, 3))
    assert nothing.tokens == []
    assert plan_forwards(nothing, 10) == []
    assert idle_forward().slots.numel() == 0


def test_what_follows_the_last_scored_token_is_dropped():
    ids = torch.arange(1, 8)[None]
    found = scored_sequences(ids, torch.ones_like(ids), 5, generated=torch.tensor([[1, 0, 1, 0, 0]]))
    assert found.tokens[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[-1, 0, 2]], r"completion_parents\[0\]\[2\] must be -1 .* earlier token of the completion, got 2"),
        ([[-1, -2, 1]], r"completion_parents\[0\]\[1\] must be -1 .* got -2"),
        ([[0, 0, 1]], r"completion_parents\[0\]\[0\] must be -1"),
        ([[-1, 0]], r"must have shape \(B, C\)=\(1, 3\), that of the completions, got \(1, 2\)"),
    ],
)
def test_parents_that_are_no_tree_are_refused(parents, message):
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        scored_sequences(ids, ids, 3, torch.tensor(parents))


def test_an_empty_prompt_is_refused():
    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"prompts must have at least one token, .* got none in row 0; put a start"):
        scored_sequences(ids, torch.tensor([[0, 0, 1, 1, 1]] * 2), 3)


def test_a_sequence_over_the_budget_is_named():
    ids = torch.ones(2, 9, dtype=torch.int64)
    with pytest.raises(BudgetError, match="completion has 9 tokens, more than max_tokens_per_forward=8"):
        plan_forwards(scored_sequences(ids, ids, 3), 8)


def test_a_micro_batch_of_which_nothing_is_scored_has_zero_gradients(tmp_path):
    trainer = make_trainer("trie", tmp_path)
    ids = torch.randint(3, 90, (3, 9))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model.train(), ids, mask, 5, compute_entropy=True
    )
    assert not logps.any()
    assert not entropies.any()
    found = gradients(trainer.model, logps.sum() + entropies.sum())
    assert found.keys() == {name for name, _ in trainer.model.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


class _PathByPath(GRPOTrainer):
    """The plain reference for branching completions: one stock forward a token, of its own history alone."""

    tree: dict[tuple[int, ...], list[int]]

    def _generate(self, prompts):
        output = super()._generate(prompts)
        self.tree = {tuple(ids): own for ids, own in zip(output[1], output[5].pop("completion_parents"), strict=True)}
        return output

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ) -> tuple[Tensor, Tensor | None, None]:
        logps = torch.zeros(input_ids.shape[0], logits_to_keep)
        entropies = torch.zeros_like(logps)
        start = input_ids.shape[1] - logits_to_keep
        for row in range(input_ids.shape[0]):
            prompt = input_ids[row, :start][attention_mask[row, :start] == 1]
            completion = input_ids[row, start:][attention_mask[row, start:] == 1]
            parents = self.tree[tuple(completion.tolist())]
            for token in range(len(completion)):
                history = torch.cat([prompt, completion[_path(parents, token)]])
                logits = model(input_ids=history[None], use_cache=False).logits[0, -2] / self.temperature
                distribution = torch.distributions.Categorical(logits=logits)
                logps[row, token] = distribution.log_prob(completion[token])
                entropies[row, token] = distribution.entropy()
        return logps, entropies if compute_entropy else None, None


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (
            "qwen3",
            {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2, **MOVING, "learning_rate": 0.1},
        ),
        ("qwen3", {"loss_type": "grpo", "beta": 0.1, "temperature": 0.8, **MOVING}),
        ("gemma3", {"importance_sampling_level": "sequence", "loss_type": "grpo", **MOVING}),
    ],
    ids=["accumulation", "reference", "window_gspo"],
)
def test_branching_completions_equal_their_paths_one_by_one(family, options, tmp_path, monkeypatch):
    """Threads and histories that share generated tokens, with different advantages and clipping active."""
    monkeypatch.setattr("tests.support.grpo.GRPOTrainer", _PathByPath)
    runs = []
    for kind in ("stock", "trie"):
        trainer = make_trainer(kind, tmp_path, family=family, rollout_func=branching_rollouts, **options)
        runs.append(train(trainer))
    (expected, stock), (found, trie) = runs
    for one, other in zip(found, expected, strict=True):
        assert largest_error(one, other) < 1e-5
    for one, other in zip(trie, stock, strict=True):
        # Other metrics are means over micro-batches, which are composed differently.
        whole = "gradient_accumulation_steps" not in options
        for name in other.keys() - {"step_time"} if whole else {"loss", "grad_norm"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    assert trie[1]["clip_ratio/region_mean"] > 0
    assert trie[0]["sharing_ratio"] > 2


def test_rollouts_that_share_generated_tokens_keep_their_own_advantages(tmp_path):
    """Chains again, against stock TRL: completions of a group begin alike, some are equal, advantages differ."""

    def rollouts(prompts, trainer):
        rng = random.Random(len(prompts))
        ids = []
        for start in range(0, len(prompts), GROUP):
            first = [rng.randrange(3, 90) for _ in range(6)]
            ids += [first + [30 + start + i // 2] * (i // 2) for i in range(GROUP)]
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids,
            "logprobs": None,
        }

    def reward(completion_ids, **_):
        return [float(i % 3) + token_reward([ids])[0] for i, ids in enumerate(completion_ids)]

    runs = []
    for kind in ("stock", "trie"):
        trainer = make_trainer(kind, tmp_path, rollout_func=rollouts, reward_funcs=reward, **MOVING)
        runs.append(train(trainer))
    (expected, stock), (found, trie) = runs
    for one, other in zip(found, expected, strict=True):
        assert largest_error(one, other) < 1e-5
    assert trie[1]["clip_ratio/region_mean"] == pytest.approx(stock[1]["clip_ratio/region_mean"])
    assert trie[1]["clip_ratio/region_mean"] > 0
    assert trie[0]["sharing_ratio"] > 3


def test_parents_of_the_wrong_length_are_named(tmp_path):
    def rollouts(prompts, trainer):
        output = branching_rollouts(prompts, trainer)
        output["completion_parents"][1].pop()
        return output

    trainer = make_trainer("trie", tmp_path, rollout_func=rollouts)
    with pytest.raises(ValueError, match=r"completion_parents\[1\] must have one parent a token, \d+, got \d+"):
        trainer.train()
