"""Offline packing: a data set of samples -> a data set of packed forests, one forest a row, with statistics.

One batched `datasets.map`: cached by content, run by several processes, each batch of samples packed on its own.
Nothing is truncated: a trie over the budget is split into tries with the same summed loss, and a sample with a
sequence that alone exceeds the budget is a problem, like malformed text. Problems stop the run, or, with
`drop_invalid`, are counted.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value

from tw_core import pack_forest
from tw_core.errors import BudgetError, ThreadWeaverError
from tw_recipes.sft.collator import packed_columns
from tw_recipes.sft.rows import RowError, row_format, row_to_trie
from tw_recipes.tokens import require_tag_tokens

_INT32 = List(Value("int32"))
FEATURES = Features(
    {
        "input_ids": _INT32,
        "position_ids": _INT32,
        "subtree_end": _INT32,
        "target_rows": _INT32,
        "target_ids": _INT32,
        "target_weights": _INT32,
        "num_expanded_tokens": Value("int64"),
        "num_sequences": Value("int64"),
        "trie_lengths": _INT32,
        "split_samples": Value("int64"),
        "problems": List(Value("string")),
    }
)
# The statistics of a batch of samples stand in its first forest's row.
_EMPTY = {name: [] if isinstance(kind, List) else 0 for name, kind in FEATURES.items()}


@dataclass
class DatasetStatistics:
    """What `prepare_dataset` saw and made; `str()` gives the report printed before training."""

    samples: int = 0
    forests: int = 0
    tokens: int = 0
    expanded_tokens: int = 0
    targets: int = 0
    sequences: int = 0
    split_samples: int = 0
    max_tokens: int = 0
    trie_lengths: list[int] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    first_problems: list[str] = field(default_factory=list)

    @property
    def sharing_ratio(self) -> float:
        """Expanded tokens / trie tokens."""
        return self.expanded_tokens / max(self.tokens, 1)

    @property
    def fill(self) -> float:
        """Share of the row budget that carries tokens."""
        return self.tokens / max(self.forests * self.max_tokens, 1)

    def __str__(self) -> str:
        invalid = sum(self.problems.values())
        lengths = np.percentile(self.trie_lengths or [0], [50, 95, 100]).astype(int)
        lines = [
            f"{self.samples - invalid} of {self.samples} samples used, {self.sequences} sequences",
            f"{self.tokens:,} trie tokens, {self.expanded_tokens:,} expanded: sharing ratio {self.sharing_ratio:.2f}",
            f"{self.targets:,} trained tokens",
            f"rows per trie: median {lengths[0]:,}, 95 % {lengths[1]:,}, max {lengths[2]:,}; {self.split_samples} cut",
            f"{self.forests} packed rows of at most {self.max_tokens:,}, {self.fill:.1%} full",
        ]
        if invalid:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self.problems.most_common())
            lines += [f"{invalid} samples dropped: {kinds}", *(f"  {problem}" for problem in self.first_problems)]
        return "\n".join(lines)


def prepare_dataset(
    dataset: Dataset,
    tokenizer: Any = None,
    *,
    max_tokens: int,
    pack_samples: bool = True,
    drop_invalid: bool = False,
    num_proc: int | None = None,
    batch_size: int = 256,
) -> tuple[Dataset, DatasetStatistics]:
    """Turn samples into packed forests for `TrieCollator`.

    Args:
        dataset: Map-style data set whose rows have a format of `tw_recipes.sft.rows`. Packed data sets pass through.
        tokenizer: For text and messages, with the tags as single tokens.
        max_tokens: Row budget of one forest.
        pack_samples: False keeps one trie a row.
        drop_invalid: Drop and count samples that cannot be trained on, instead of raising.
        num_proc: Processes of `datasets.map`.
        batch_size: Samples that are packed together.

    Returns:
        The packed data set and its statistics.

    Raises:
        RowError: Unknown columns, no row, an invalid sample without `drop_invalid`, or nothing is left.
        ValueError: `max_tokens` is no number of rows.
    """
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens must be an int >= 1 (the rows of a forest), got {max_tokens!r}; e.g. 16384")
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "dataset must be a map-style datasets.Dataset, got an IterableDataset; load it without streaming"
        )
    if "subtree_end" in dataset.column_names:
        return dataset, statistics_of(dataset, max_tokens)
    kind = row_format(dataset.column_names)
    if kind in ("text", "messages"):
        if tokenizer is None:
            raise RowError("tokenizer", "rows of text or messages need a tokenizer; pass processing_class or tokenizer")
        require_tag_tokens(tokenizer)
        if kind == "messages" and tokenizer.chat_template is None:
            raise RowError(
                "chat_template",
                "rows of messages need a tokenizer with a chat template, got one without; set chat_template_path (or "
                "tokenizer.chat_template), or give the columns prompt and text",
            )
    if not len(dataset):
        raise RowError("empty", "the data set has no row; check the file and the split")
    packed = dataset.map(
        _pack_batch,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_tokens": max_tokens, "pack_samples": pack_samples},
        features=FEATURES,
        num_proc=num_proc,
        writer_batch_size=64,
        desc="Packing tries",
    )
    statistics = statistics_of(packed, max_tokens)
    statistics.samples = len(dataset)
    if statistics.problems and (not drop_invalid or not statistics.tokens):
        kinds = ", ".join(f"{kind} {count}" for kind, count in statistics.problems.most_common())
        raise RowError(
            next(iter(statistics.problems)),
            f"{sum(statistics.problems.values())} of {len(dataset)} samples cannot be trained on ({kinds}); "
            f"{statistics.first_problems[0]}. Repair them, "
            + ("or set drop_invalid=True to drop and count them" if not drop_invalid else "since none would be left"),
        )
    if statistics.problems:  # a batch without any usable sample has left an empty row
        packed = packed.filter(lambda expanded: expanded > 0, input_columns="num_expanded_tokens")
    return packed, statistics


def statistics_of(packed: Dataset, max_tokens: int) -> DatasetStatistics:
    """Statistics of a packed data set."""
    found = DatasetStatistics(max_tokens=max_tokens)
    columns = packed.select_columns(
        ["num_expanded_tokens", "num_sequences", "trie_lengths", "split_samples", "problems", "target_weights"]
    )
    for batch in columns.with_format("numpy").iter(64):
        found.expanded_tokens += int(batch["num_expanded_tokens"].sum())
        found.sequences += int(batch["num_sequences"].sum())
        found.split_samples += int(batch["split_samples"].sum())
        found.targets += sum(int(np.sum(weights)) for weights in batch["target_weights"])
        found.forests += int((batch["num_expanded_tokens"] > 0).sum())
        for lengths in batch["trie_lengths"]:
            found.trie_lengths += np.asarray(lengths).tolist()
        for text in (text for texts in batch["problems"] for text in texts):
            problem = json.loads(text)
            found.problems[problem["kind"]] += 1
            if len(found.first_problems) < 5:
                found.first_problems.append(f"row {problem['sample'] + 1}: {problem['message']}")
    found.tokens = sum(found.trie_lengths)
    found.samples = len(found.trie_lengths)
    return found


def _pack_batch(
    batch: Mapping[str, list], indices: list[int], *, tokenizer: Any, max_tokens: int, pack_samples: bool
) -> dict[str, list]:
    tries, problems, split_samples = [], [], 0
    for at, index in enumerate(indices):
        try:
            trie = row_to_trie({name: column[at] for name, column in batch.items()}, tokenizer)
            pieces = [trie] if trie.num_tokens <= max_tokens else trie.split(max_tokens)
            pieces = [piece for piece in pieces if piece.weights.any()]
            if not pieces:
                raise RowError("no_targets", "every loss mask is empty, so nothing is trained")
        except BudgetError as error:
            problems.append(
                _problem(index, "overlong", f"{error}; the budget is max_tokens, max_length in TrieSFTConfig")
            )
        except RowError as error:
            problems.append(_problem(index, error.kind, str(error)))
        except ThreadWeaverError as error:
            problems.append(_problem(index, type(error).__name__, str(error)))
        else:
            tries += pieces
            split_samples += len(pieces) > 1
    forests = pack_forest(tries, max_tokens) if pack_samples else [trie.pack() for trie in tries]
    rows = [_EMPTY | packed_columns(forest) for forest in forests] or [_EMPTY]
    rows[0] = rows[0] | {
        "num_sequences": sum(trie.num_sequences for trie in tries),
        "trie_lengths": [trie.num_tokens for trie in tries],
        "split_samples": split_samples,
        "problems": problems,
    }
    return {name: [row[name] for row in rows] for name in FEATURES}


def _problem(sample: int, kind: str, message: str) -> str:
    return json.dumps({"sample": sample, "kind": kind, "message": message})
