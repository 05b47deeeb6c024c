"""Data set rows of the stages: problems with one side's solutions, and the published loss for comparison.

Tests: tests/recipes/pipelines/test_reproduce_stages.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from tw_core import ReasoningTrie
from tw_recipes.pipelines.reproduce.settings import Settings
from tw_recipes.sft.collator import packed_columns
from tw_recipes.sft.data import FEATURES
from tw_recipes.sft.rows import text_units

Side = Literal["sequential", "forkjoin"]
SIDES: tuple[Side, ...] = ("sequential", "forkjoin")

# Problems are taken from one stream of the task, each kind of use from its own place.
_SELF_TRAINING, _REINFORCEMENT = 1, 2


def training_rows(
    settings: Settings, side: Side, *, first: int, steps: int, sequential_share: float = 0.0
) -> list[dict[str, str]]:
    """Training problems, the same for both sides, with a side's solutions.

    Args:
        settings: Of the run.
        side: Whose solutions.
        first: Batches to leave out at the head of the stream.
        steps: Batches.
        sequential_share: Share of the fork/join side's problems that get the sequential solution all the same.
    """
    training = settings.training
    where: dict[str, Any] = {"seed": settings.seed, "offset": first * training.batch}
    task, count = settings.make_task(), steps * training.batch
    rows = task.rows(count, style="sequential", **where)
    if side == "sequential":
        return rows
    forked = task.rows(count, style="forkjoin", **where)
    keep = np.random.default_rng([settings.seed, first, 7]).random(count) < sequential_share
    return [plain if whole else fork for plain, fork, whole in zip(rows, forked, keep, strict=True)]


def self_training_problems(settings: Settings, round: int) -> list[dict[str, str]]:
    """New training problems for one round, the same for both sides."""
    count = settings.self_training.prompts
    return settings.make_task().rows(count, seed=_seed(settings, _SELF_TRAINING), offset=round * count)


def reinforcement_problems(settings: Settings) -> list[dict[str, str]]:
    """New training problems for reinforcement learning, the same for both sides."""
    count = settings.reinforcement.steps * settings.reinforcement.prompts
    return settings.make_task().rows(count, seed=_seed(settings, _REINFORCEMENT))


def held_out_problems(settings: Settings) -> list[dict[str, str]]:
    """Held-out problems, with fork/join solutions to compare threads with."""
    return settings.make_task().rows(settings.evaluation.problems, seed=settings.seed, split="test")


def _seed(settings: Settings, use: int) -> int:
    return 1_000_000 * use + settings.seed


def cycled(rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows, each as often as the others, in random order."""
    if not count:
        return []
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))])[:count]
    return [dict(rows[place]) for place in order]


def leaky_rows(rows: Iterable[Mapping[str, str]], tokenizer: Any) -> list[dict[str, Any]]:
    """The same rows with loss on every token after the prompt, once each: what the paper's code trains.

    Beside the tokens that the model writes, injected headers and the joined copies of threads 2..n carry loss.

    Returns:
        Rows {"sequences", "loss_masks"}.
    """
    found = []
    for row in rows:
        prompt = len(tokenizer.encode(row["prompt"], add_special_tokens=False))
        sequences, masks = [], []
        for unit in text_units(row["prompt"], row["text"], tokenizer):
            sequence = [*unit.context, *unit.completion]
            known = max([prompt, *(_common(sequence, earlier) for earlier in sequences)])
            sequences.append([int(token) for token in sequence])
            masks.append([0] * known + [1] * (len(sequence) - known))
        found.append({"sequences": sequences, "loss_masks": masks})
    return found


def leaky_dataset(rows: Sequence[Mapping[str, str]], tokenizer: Any, num_proc: int | None = None) -> Dataset:
    """`leaky_rows` as packed tries, one a row, by `num_proc` processes."""
    plain = Dataset.from_list([{"prompt": row["prompt"], "text": row["text"]} for row in rows])
    return plain.map(
        _leaky_batch,
        batched=True,
        batch_size=64,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=plain.column_names,
        features=FEATURES,
        num_proc=num_proc,
        desc="Packing tries",
    )


def _leaky_batch(batch: Mapping[str, list[str]], tokenizer: Any) -> dict[str, list[Any]]:
    whole = [{"prompt": prompt, "text": text} for prompt, text in zip(batch["prompt"], batch["text"], strict=True)]
    packed = []
    for row in leaky_rows(whole, tokenizer):
        trie = ReasoningTrie.from_sequences(row["sequences"], row["loss_masks"])
        statistics = {"num_sequences": trie.num_sequences, "trie_lengths": [trie.num_tokens]}
        packed.append({**packed_columns(trie.pack()), **statistics, "split_samples": 0, "problems": []})
    return {name: [row[name] for row in packed] for name in FEATURES}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    size = min(len(one), len(other))
    differs = np.asarray(one[:size]) != np.asarray(other[:size])
    return int(differs.argmax()) if differs.any() else size
