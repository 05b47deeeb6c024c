"""`TrieSFTTrainer`: TRL's SFTTrainer on packed tries. The loss, its head and its normalisation are TRL's.

The subclass prepares data sets, calls `install`, trains tag rows beside LoRA, and counts logical (expanded) tokens. A
stock SFTTrainer with `TrieCollator` and `install(trainer.model)` gives the same numbers (docs/sft.md).
"""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path

from tw_recipes import _compat
from tw_recipes.sft.collator import TrieCollator
from tw_recipes.sft.config import TrieSFTConfig
from tw_recipes.sft.data import DatasetStatistics, prepare_dataset
from tw_recipes.tokens import TagTokenError, require_tag_tokens, tag_token_ids
from tw_recipes.trainers import prepare_for_tries

_REFUSED = {
    "data_collator": "the trainer builds its TrieCollator",
    "formatting_func": "map the data set to an accepted row format instead",
    "compute_loss_func": "it needs the full shifted logits",
    "compute_metrics": "it needs the full shifted logits; loss, entropy and token accuracy are logged",
}


class TrieSFTTrainer(SFTTrainer):
    """Supervised fine-tuning in which every shared token is computed once.

    Args:
        model: Name, path or model. It must pass `tw_recipes.install`.
        args: `TrieSFTConfig`.
        train_dataset: Rows of a format of `tw_recipes.sft.rows`, or packed by `prepare_dataset`.
        eval_dataset: Likewise; also a dict of data sets.
        processing_class: Tokenizer with the tags as single tokens. Defaults to the model's own.
        peft_config: For LoRA; the tags' rows are trained too unless it says what to train (`train_tag_tokens`).
        **kwargs: As in SFTTrainer: callbacks, optimizers, …

    Attributes:
        dataset_statistics: `DatasetStatistics` of the training set, logged once before training.
    """

    _tag_names = ["trl", "sft", "threadweaver"]  # noqa: RUF012 - TRL reads this class attribute
    _name = "Trie SFT"

    def __init__(
        self,
        model: Any,
        args: TrieSFTConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        _compat.require("trl")
        if not isinstance(args, TrieSFTConfig):
            raise TypeError(f"args must be a TrieSFTConfig, got {type(args).__name__}")
        for name in sorted(_REFUSED.keys() & kwargs.keys()):
            if kwargs[name] is not None:
                raise ValueError(f"{name} is not supported by TrieSFTTrainer: {_REFUSED[name]}")
        if processing_class is None:
            source = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        if args.chat_template_path is not None:  # TRL reads it later, when the data is packed
            processing_class.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
        options = {
            "max_tokens": args.max_length,
            "pack_samples": args.pack_samples,
            "drop_invalid": args.drop_invalid,
            "num_proc": args.dataset_num_proc,
        }
        with PartialState().main_process_first():
            train_dataset, statistics = prepare_dataset(train_dataset, processing_class, **options)
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    name: prepare_dataset(part, processing_class, **options)[0] for name, part in eval_dataset.items()
                }
            elif eval_dataset is not None:
                eval_dataset = prepare_dataset(eval_dataset, processing_class, **options)[0]
        self.dataset_statistics: DatasetStatistics = statistics
        if PartialState().is_main_process:
            print(statistics)
        if peft_config is not None and args.train_tag_tokens and _has_tags(processing_class):
            if isinstance(model, str):
                model = create_model_from_path(model, **(args.model_init_kwargs or {}))
                args.model_init_kwargs = None
            _train_tag_rows(model, peft_config, tag_token_ids(processing_class))
        collator = TrieCollator(pad_to_multiple_of=args.pad_to_multiple_of, count_logical_tokens=True)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collator,
            peft_config=peft_config,
            **kwargs,
        )
        prepare_for_tries(self, self.model)
        self._tally = {"logical": 0, "computed": 0}
        self._tally_since = perf_counter()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """TRL's loss; `num_tokens` counts the expanded tokens."""
        logical = inputs.pop("num_logical_tokens", None)
        before = self._total_train_tokens
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training and logical is not None:
            computed = self._total_train_tokens - before
            seen = int(self.accelerator.gather(logical.reshape(1)).sum()) // self._tp_size
            self._total_train_tokens = before + seen
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self._tally["logical"] += seen
            self._tally["computed"] += computed
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL, with raw data sets packed first; its time does not count as training time."""
        start = perf_counter()
        dataset = kwargs.pop("eval_dataset", args[0] if args else None)
        if isinstance(dataset, Dataset):
            dataset, _ = prepare_dataset(
                dataset,
                self.processing_class,
                max_tokens=self.args.max_length,
                pack_samples=self.args.pack_samples,
                drop_invalid=self.args.drop_invalid,
            )
        result = super().evaluate(dataset, *args[1:], **kwargs)
        self._tally_since += perf_counter() - start
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sharing ratio and tokens per second (expanded and computed) of the steps since the last log."""
        if self.model.training and self._tally["computed"]:
            seconds = perf_counter() - self._tally_since
            logs["sharing_ratio"] = self._tally["logical"] / self._tally["computed"]
            logs["logical_tokens_per_second"] = self._tally["logical"] / seconds
            logs["computed_tokens_per_second"] = self._tally["computed"] / seconds
            self._tally = {"logical": 0, "computed": 0}
            self._tally_since = perf_counter()
        super().log(logs, start_time)


def _has_tags(tokenizer: Any) -> bool:
    try:
        require_tag_tokens(tokenizer)
    except TagTokenError:
        return False
    return True


def _train_tag_rows(model: torch.nn.Module, peft_config: Any, ids: list[int]) -> None:
    """Let PEFT train the rows `ids` of the embedding and of an untied head, unless the config decides about them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    wanted = [names[id(embedding)]]
    if head is not None and head.weight is not embedding.weight:
        wanted.append(names[id(head)])
    decided = {*(peft_config.modules_to_save or []), *(getattr(peft_config, "target_modules", None) or [])}
    if getattr(peft_config, "trainable_token_indices", 0) is None and not decided & set(wanted):
        peft_config.trainable_token_indices = dict.fromkeys(wanted, ids)
