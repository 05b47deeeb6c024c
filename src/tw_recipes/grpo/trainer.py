"""`TrieGRPOTrainer`: TRL's GRPOTrainer whose shared prefixes are computed once, with the same numbers.

    from tw_recipes import TrieGRPOConfig as GRPOConfig, TrieGRPOTrainer as GRPOTrainer

Everything but the log-probs and the order of completions is TRL's: losses, advantages, reference models, generation,
logging, checkpoints. Guarded by tests/recipes/grpo/test_trainer.py and test_distributed.py, against stock TRL.
"""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import GRPOTrainer

from tw_recipes import _compat
from tw_recipes.attention import native_attention
from tw_recipes.grpo.batching import GroupedBatches
from tw_recipes.grpo.config import TrieGRPOConfig
from tw_recipes.grpo.logps import TrieLogps
from tw_recipes.trainers import prepare_for_tries


class TrieGRPOTrainer(TrieLogps, GroupedBatches, GRPOTrainer):
    """GRPO in which the tokens that completions share are computed once.

    Logs, beside TRL's metrics: `sharing_ratio` (tokens of the sequences one by one over tokens computed), and
    `logical_tokens_per_second` and `computed_tokens_per_second` of the update, generation excluded.

    Args:
        model: Name, path or model. It must pass `tw_recipes.install`.
        reward_funcs: As in GRPOTrainer.
        args: `TrieGRPOConfig`.
        **kwargs: As in GRPOTrainer: train_dataset, processing_class, peft_config, rollout_func, tools, … A
            `rollout_func` whose completions branch returns `completion_parents` (`TrieLogps`).

    Raises:
        UnsupportedModelError: The model's layers do not follow a trie.
        ValueError: An option that tries cannot honour: images, attention dropout.
    """

    _tag_names = ["trl", "grpo", "threadweaver"]  # noqa: RUF012 - TRL reads this class attribute
    _name = "Trie GRPO"

    def __init__(self, model: Any, reward_funcs: Any = None, args: TrieGRPOConfig | None = None, **kwargs: Any):
        _compat.require("trl")
        if not isinstance(args, TrieGRPOConfig):
            raise TypeError(f"args must be a TrieGRPOConfig, got {type(args).__name__}")
        if isinstance(kwargs.get("processing_class"), ProcessorMixin):
            raise ValueError(
                "processing_class must be a tokenizer, got a multimodal processor: a trie holds text alone; train on "
                "images with TRL's GRPOTrainer"
            )
        super().__init__(model, reward_funcs, args, **kwargs)
        prepare_for_tries(self, *(each for each in (self.model, self.ref_model) if each is not None))
        if args.graph_rows and (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.aux_loss_enabled):
            raise ValueError(
                f"graph_rows must be 0 with FSDP, DeepSpeed or a load-balancing loss, got {args.graph_rows}: graphs "
                "hold fixed where parameters lie, and replay no hooks"
            )
        self._update_seconds = 0.0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Generation runs under the attention that the model came with: continuous batching knows no other."""
        with native_attention(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        start = perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            self._update_seconds -= perf_counter() - start  # `training_step` counts it, and it is not the update
        return inputs

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As in TRL; the time without generation counts for tokens per second."""
        start = perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._update_seconds += perf_counter() - start
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sharing ratio and tokens per second of the updates since the last log, over all ranks."""
        if self.model.training:
            counts = [self._logical_tokens, self._computed_tokens, self._update_seconds]
            counts = torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)
            logical, computed, seconds = self.accelerator.reduce(counts, reduction="sum").tolist()
            if computed:
                seconds /= self.accelerator.num_processes
                logs["sharing_ratio"] = logical / computed
                logs["logical_tokens_per_second"] = logical / seconds
                logs["computed_tokens_per_second"] = computed / seconds
            self._logical_tokens = self._computed_tokens = 0
            self._update_seconds = 0.0
        super().log(logs, start_time)
