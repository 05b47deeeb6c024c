"""`TrieCollator`: dataset rows -> one packed row of int tensors for `model(...)` under `install`.

Wire format (all (1, N) or (1, M), integers, so that no engine casts them; no attention_mask, the trie is the mask):

    input_ids, position_ids (= depth)   (1, N) int64
    subtree_end                         (1, N) int32
    target_rows                         (1, M) int64   row whose hidden state predicts target m
    shift_labels, labels                (1, M) int64   the target tokens; a target of weight w is listed w times

Because weights are repetitions, stock losses, `num_items_in_batch`, entropy and token accuracy are those of the
expanded sequences. `labels` repeats `shift_labels`: without it transformers' Trainer does not count a batch's items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tw_core import PackedTrie
from tw_core.errors import BudgetError, ShapeError
from tw_recipes.sft.rows import row_to_trie

PACKED_COLUMNS = (
    "input_ids",
    "position_ids",
    "subtree_end",
    "target_rows",
    "target_ids",
    "target_weights",
    "num_expanded_tokens",
)


def packed_columns(packed: PackedTrie) -> dict[str, Any]:
    """The columns of one packed row in a dataset; what `TrieCollator` reads."""
    tensors = {name: getattr(packed, name).numpy() for name in PACKED_COLUMNS[:-1]}
    return tensors | {"num_expanded_tokens": packed.num_expanded_tokens}


@dataclass
class TrieCollator:
    """Collate packed rows (or raw rows, with a tokenizer) into one forest.

    Args:
        tokenizer: Needed for rows of text or messages; rows of units, sequences or packed columns go without.
        max_tokens: Largest number of rows of the forest. None: no limit.
        pad_to_multiple_of: Append that many isolated rows as needed; they carry no target and see only themselves.
        count_logical_tokens: Add `num_logical_tokens` (1, 1), the expanded tokens, which `TrieSFTTrainer` logs.

    Raises:
        BudgetError: The rows of one batch exceed `max_tokens`.
        ShapeError: A batch without a row, or without a target.
        ValueError: `pad_to_multiple_of` is below 1.
    """

    tokenizer: Any = None
    max_tokens: int | None = None
    pad_to_multiple_of: int | None = None
    count_logical_tokens: bool = False

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be >= 1, got {self.pad_to_multiple_of}; None pads nothing")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate dataset rows; see the class and the module docstring."""
        if not rows:
            raise ShapeError("rows is empty; pass at least one row of a data set")
        parts = [self._columns(row) for row in rows]
        lengths = [len(part["input_ids"]) for part in parts]
        total = sum(lengths)
        if self.max_tokens is not None and total > self.max_tokens:
            raise BudgetError(
                f"a batch of {len(rows)} samples has {total} rows, more than max_tokens={self.max_tokens}; lower the "
                "batch size, or pack the data set with prepare_dataset, which splits samples exactly"
            )
        offsets = np.cumsum([0, *lengths[:-1]])
        multiple = self.pad_to_multiple_of or 1
        padding = -total % multiple
        weights = np.concatenate([part["target_weights"] for part in parts])
        if not weights.sum():
            raise ShapeError("no row of the batch has a target: every loss mask is empty; drop such samples")
        rows_of_targets = np.concatenate([part["target_rows"] + at for part, at in zip(parts, offsets, strict=True)])
        labels = _tensor(np.repeat(np.concatenate([part["target_ids"] for part in parts]), weights))
        ends = [part["subtree_end"] + at for part, at in zip(parts, offsets, strict=True)]
        batch = {
            "input_ids": _tensor(np.concatenate([*(part["input_ids"] for part in parts), np.zeros(padding)])),
            "position_ids": _tensor(np.concatenate([*(part["position_ids"] for part in parts), np.zeros(padding)])),
            "subtree_end": _tensor(np.concatenate([*ends, np.arange(total, total + padding) + 1])).int(),
            "target_rows": _tensor(np.repeat(rows_of_targets, weights)),
            "shift_labels": labels,
            "labels": labels.clone(),
        }
        if self.count_logical_tokens:
            batch["num_logical_tokens"] = torch.tensor([[sum(int(part["num_expanded_tokens"]) for part in parts)]])
        return batch

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if "subtree_end" in row:
            missing = [name for name in PACKED_COLUMNS if name not in row]
            if missing:
                raise ShapeError(
                    f"a packed row lacks the columns {missing}; set remove_unused_columns=False, and build packed rows "
                    "with prepare_dataset"
                )
            return {name: np.asarray(row[name], dtype=np.int64) for name in PACKED_COLUMNS}
        return packed_columns(row_to_trie(row, self.tokenizer).pack())


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]
