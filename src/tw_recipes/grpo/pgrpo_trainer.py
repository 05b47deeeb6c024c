"""`PGRPOTrainer`: fork/join rollouts, the parallelization-aware reward, one advantage a trajectory.

    prompts ─ RolloutSource ─► rollouts ─ rollout_row ─► one row each ─ TrieGRPOTrainer ─► log-probs (B, C) ─► loss
                                  └────── joined text, measures ─► reward functions ─► A = r - mean of the group

A rollout is one row whose completion branches, so that losses, clipping, KL and metrics stay TRL's; with the default
loss_type "dapo" the loss is the global token mean of SPEC section 6, over micro-batches, accumulation and ranks.
Tests: tests/recipes/grpo/test_pgrpo_gradients.py (against the formula, unit by unit) and test_pgrpo_trainer.py.
Source: arXiv:2512.07843, section on P-GRPO.
"""

import logging
from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl.data_utils import is_conversational

from tw_core import TagIds
from tw_core.errors import ThreadWeaverError
from tw_recipes.decoding.engine import Engine
from tw_recipes.decoding.rollout import LOST, Rollout
from tw_recipes.evaluation.grading import Grader
from tw_recipes.grpo.epoch_sampler import EpochRepeatSampler
from tw_recipes.grpo.pgrpo_config import PGRPOConfig
from tw_recipes.grpo.pgrpo_metrics import batch_metrics, write_rollouts
from tw_recipes.grpo.rollout_source import RolloutSource, make_engine
from tw_recipes.grpo.rollouts import rollout_row
from tw_recipes.grpo.trainer import TrieGRPOTrainer
from tw_recipes.rewards import (
    Judge,
    acceleration_reward,
    correctness_reward,
    format_reward,
    guarded,
    length_penalty,
)
from tw_recipes.rollout import THINK, trajectory_row

logger = logging.getLogger(__name__)


class RolloutError(ThreadWeaverError, RuntimeError):
    """More rollouts of a batch failed than `max_failed_share` allows, or needed log-probs are missing."""


class PGRPOTrainer(TrieGRPOTrainer):
    """P-GRPO: TrieGRPOTrainer on fork/join rollouts.

    Logs, beside TRL's and TrieGRPOTrainer's metrics: `accuracy`, the parts of the reward, `rollout/…`
    (`pgrpo_metrics.batch_metrics`), `sampling/trie_logp_difference/{mean,max}` (sampler against trie, at the first use
    of a batch), `groups_without_signal` and `staleness`. Rollouts are written to OUTPUT_DIR/rollouts.

    Args:
        model: Name, path or model. It must pass `tw_recipes.install`, and its tokenizer have the tags.
        args: `PGRPOConfig`.
        train_dataset: Rows with "prompt" (text, or messages) and the column that the reward functions read, by default
            "answer".
        reward_funcs: TRL reward functions, called with the joined response as completion and the column `rollout`.
            None: `default_rewards`.
        eval_dataset: Likewise.
        processing_class: Tokenizer with the tags as single tokens. Defaults to the model's own.
        grader: Of the default rewards. None: math-verify.
        engine: Decodes rollouts instead of the engine that `args` names; it must follow the model's weights.
        **kwargs: As in GRPOTrainer: callbacks, optimizers, peft_config, …

    Raises:
        ValueError: A data set without the columns, or an engine that cannot work here.
        GrammarError: A tag is not one token of the tokenizer.
    """

    _tag_names = ["trl", "grpo", "p-grpo", "threadweaver"]  # noqa: RUF012 - TRL reads this class attribute
    _name = "P-GRPO"

    def __init__(
        self,
        model: Any,
        args: PGRPOConfig,
        train_dataset: Any,
        *,
        reward_funcs: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        grader: Grader | None = None,
        engine: Engine | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, PGRPOConfig):
            raise TypeError(f"args must be a PGRPOConfig, got {type(args).__name__}")
        for name in ("rollout_func", "tools", "environment_factory"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is not supported by PGRPOTrainer, which decodes by itself; use TrieGRPOTrainer"
                )
        if processing_class is None:
            source = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        tag_ids = TagIds.from_tokenizer(processing_class)
        self.judge = Judge(grader) if reward_funcs is None else None
        if self.judge is not None:
            reward_funcs = default_rewards(args, self.judge)
            _require_column(train_dataset, args.answer_column)
        if processing_class.chat_template is None and is_conversational(next(iter(train_dataset), {})):
            raise ValueError(
                "prompts of messages need a tokenizer with a chat template, got one without; set the tokenizer's "
                "chat_template, or give prompts as text (the command: --chat false)"
            )
        listed = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(
            model,
            [_guard(function, args) for function in listed],
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if engine is None:
            zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
            sharded = bool(self.is_fsdp_enabled or zero3)
            vllm = self.vllm_generation if self.use_vllm else None
            engine = make_engine(self.model, self._tokenizer, args, self.eos_token_ids, sharded=sharded, vllm=vllm)
        self.source = RolloutSource(engine, args, tag_ids, self.eos_token_ids)
        self.rollout_func = self._roll_out
        self._rollouts: list[Rollout] = []
        self._rows: list[dict[str, Any]] = []
        self._failed: list[bool] = []
        self._rewards: Tensor | None = None
        self._eval_batches = 0
        self._generated_at = 0
        self._sampled: tuple[Tensor, Tensor] | None = None

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        stock = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            data_source=stock.data_source,
            mini_repeat_count=stock.mini_repeat_count,
            batch_size=stock.batch_size,
            repeat_count=stock.repeat_count,
            shuffle=stock.shuffle,
            seed=stock.seed,
        )

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's rollout_func: this process's prompts, each repeated once a generation -> rows of the batch."""
        ids = self._prompt_ids(prompts)
        if self.model.training:
            step: Any = (self.state.global_step, self._step % self.args.gradient_accumulation_steps)
            self._generated_at = self.state.global_step
        else:
            step, self._eval_batches = ("eval", self._eval_batches), self._eval_batches + 1
        rank = self.accelerator.process_index
        before = self.source.retried
        rollouts = self.source.rollouts(ids, [f"{rank}.{place}" for place in range(len(ids))], step)
        self._rollouts = rollouts
        self._rows = [trajectory_row(rollout, self._tokenizer, units=False) for rollout in rollouts]
        self._failed = [rollout.status in LOST for rollout in rollouts]
        self._record(batch_metrics(self._rows, self.source.retried - before, self.accelerator))
        self._stop_if_most_failed(rollouts)
        found = [rollout_row(rollout, self.eos_token_ids) for rollout in rollouts]
        trained = [self.args.train_failed_rollouts or not failed for failed in self._failed]
        logprobs = [row.logprobs for row in found]
        missing = self._missing_somewhere(logprobs)
        if missing and self.use_vllm and self.vllm_importance_sampling_correction:
            raise RolloutError(
                "the engine gave no log-probs, which vllm_importance_sampling_correction needs; start the server with "
                "--logprobs-mode processed_logprobs, or set vllm_importance_sampling_correction=False"
            )
        return {
            "prompt_ids": ids,
            "completion_ids": [row.completion_ids for row in found],
            "completion_parents": [row.parents for row in found],
            "env_mask": [row.mask if use else [0] * len(row.mask) for row, use in zip(found, trained, strict=True)],
            "logprobs": None if missing else logprobs,
            "rollout": self._rows,
        }

    def _prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
        ids, _, _ = self._tokenize_prompts(prompts)
        if not self.args.think:
            return ids
        opening = self._tokenizer.encode(THINK, add_special_tokens=False)
        return [[*row, *opening] for row in ids]

    def _missing_somewhere(self, logprobs: Sequence[list[float] | None]) -> bool:
        """Whether any process lacks log-probs of the sampler: all must give TRL the same keys."""
        lacking = torch.tensor([float(None in logprobs)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(lacking, reduction="sum").item())

    def _stop_if_most_failed(self, rollouts: Sequence[Rollout]) -> None:
        counts = torch.tensor([float(sum(self._failed)), float(len(rollouts))], device=self.accelerator.device)
        failed, total = self.accelerator.reduce(counts, reduction="sum").tolist()
        if failed > self.args.max_failed_share * total:
            reasons = [rollout.reason for rollout, lost in zip(rollouts, self._failed, strict=True) if lost]
            raise RolloutError(
                f"{failed:.0f} of {total:.0f} rollouts failed after {self.args.rollout_retries} retries, more than "
                f"max_failed_share={self.args.max_failed_share:g}; "
                f"{f'one of them: {reasons[0]}' if reasons else 'the reasons are in the logs of the other processes'}"
            )

    def _generate(self, prompts: list[Any]) -> Any:
        output = list(super()._generate(prompts))
        # TRL decodes the row, whose order is the trie's; rewards and logs read the joined response.
        texts = [self._without_eos(row["text"]) for row in self._rows]
        chat = is_conversational({"prompt": prompts[0]})
        output[3] = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        return tuple(output)

    def _without_eos(self, text: str) -> str:
        for token in self.eos_token_ids:
            text = text.removesuffix(self._tokenizer.decode([token]))
        return text

    def _calculate_rewards(self, *args: Any) -> Tensor:
        """TRL's rewards of all processes (N, F); those of failed rollouts are NaN, so that no mean holds them."""
        rewards = super()._calculate_rewards(*args)
        if not self.args.train_failed_rollouts:
            failed = torch.tensor(self._failed, device=rewards.device)
            rewards = rewards.masked_fill(self.accelerator.gather(failed)[:, None], torch.nan)
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self._write(inputs, batch["advantages"])
        self._rollouts, self._rows = [], []
        return self._without_signal(batch) if self.model.training else batch

    def _without_signal(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Groups whose rewards do not differ: advantages exactly 0; with dynamic sampling they leave loss and count."""
        assert self._rewards is not None
        totals = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
        totals = totals.masked_fill(self._rewards.isnan().all(1), torch.nan)
        signal = groups_with_signal(totals.view(-1, self.num_generations), self.args.signal_threshold)
        self._record({"groups_without_signal": 1.0 - float(signal.float().mean())})
        size = len(batch["advantages"])
        start = self.accelerator.process_index * size
        kept = signal.repeat_interleave(self.num_generations)[start : start + size]
        changed = {"advantages": batch["advantages"] * kept}
        if self.args.dynamic_sampling:
            # Rows whose completion mask is 0 cost no forward.
            mask = batch["completion_mask"] * kept[:, None]
            trained = (mask * batch["tool_mask"]).sum()
            changed |= {"completion_mask": mask, "num_items_in_batch": self.accelerator.gather(trained).sum()}
        return batch | changed

    def _split_batch(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Where a generation batch serves several updates, each one's loss is the mean over its own tokens."""
        parts = super()._split_batch(batch)
        steps, window = len(parts), self.args.gradient_accumulation_steps
        if steps % window:
            return parts  # updates straddle batches: TRL's average over the batch stands
        for start in range(0, steps, window) if steps > window else ():
            trained = sum((part["completion_mask"] * part["tool_mask"]).sum() for part in parts[start : start + window])
            items = self.accelerator.gather(trained).sum() * steps / window
            for part in parts[start : start + window]:
                part["num_items_in_batch"] = items
        return parts

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            age = self.state.global_step - self._generated_at
            self._record({"staleness": float(age)})
            if age == 0 and "sampling_per_token_logps" in inputs:
                mask = inputs["completion_mask"] * inputs["tool_mask"]
                self._sampled = (inputs["sampling_per_token_logps"], mask.bool())
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._sampled = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._sampled is not None:
            sampled, mask = self._sampled
            differences = (output[0].detach() - sampled).abs()[mask]
            sums = torch.stack([differences.sum(), mask.sum()]).double()
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
            largest = differences.amax() if differences.numel() else differences.new_zeros(())
            self._record(
                {
                    "sampling/trie_logp_difference/mean": total / max(count, 1.0),
                    "sampling/trie_logp_difference/max": float(self.accelerator.gather(largest).max()),
                }
            )
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL; every evaluation draws with the same seeds."""
        self._eval_batches = 0
        return super().evaluate(*args, **kwargs)

    def _record(self, metrics: dict[str, float]) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _write(self, inputs: Sequence[dict[str, Any]], advantages: Tensor) -> None:
        """The rollouts of the first prompts of this process, with their rewards, as a file of trajectories."""
        shown = len(inputs) if self.args.log_rollouts < 0 else self.args.log_rollouts * self.num_generations
        if not shown or not self.model.training or self._rewards is None:
            return
        rank, step, micro = self.accelerator.process_index, self.state.global_step, self._step
        names = self.reward_func_names
        own = self._rewards[rank * len(inputs) : (rank + 1) * len(inputs)]
        rows = []
        for place in range(min(shown, len(inputs))):
            columns = {name: value for name, value in inputs[place].items() if isinstance(value, str | int | float)}
            row = trajectory_row(self._rollouts[place], self._tokenizer)
            values = own[place].tolist()
            parts = {name: None if isnan(value) else value for name, value in zip(names, values, strict=True)}
            rows.append(
                {
                    **columns,
                    "id": f"step-{step}.{rank}.{place // self.num_generations}",
                    "sample": place % self.num_generations,
                    "step": step,
                    "rewards": parts,
                    "advantage": float(advantages[place]),
                    **row,
                    "key": f"step-{step}.{micro}.{row['key']}",
                }
            )
        name = f"step-{step:06d}"
        if self.args.steps_per_generation < self.args.gradient_accumulation_steps:
            name += f".{micro % self.args.gradient_accumulation_steps:03d}"
        if self.accelerator.num_processes > 1:
            name += f"-rank{rank}"
        write_rollouts(Path(self.args.output_dir) / "rollouts" / f"{name}.jsonl", rows)


def groups_with_signal(rewards: Tensor, threshold: float | None = None) -> Tensor:
    """Which groups can teach: rewards that differ, and lie on both sides of the threshold if there is one.

    Args:
        rewards: Sums of the parts; NaN where there is none. Shape (groups, generations).
        threshold: As `PGRPOConfig.signal_threshold`.

    Returns:
        Shape (groups,), bool.
    """
    low = rewards.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(1)
    high = rewards.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
    differ = high - low > 1e-6 * torch.maximum(high.abs(), low.abs()).clamp(min=1.0)
    return differ if threshold is None else differ & (low < threshold) & (high > threshold)


def default_rewards(args: PGRPOConfig, judge: Judge) -> list[Callable[..., Any]]:
    """The reward of SPEC section 6 as `args` set it: correctness, acceleration (if forking), and the optional parts."""
    column = args.answer_column
    functions = [correctness_reward(judge, incorrect=args.incorrect_reward, answer_column=column)]
    if args.forking:
        functions.append(
            acceleration_reward(judge, rho=args.acceleration_rho, eta_max=args.acceleration_max, answer_column=column)
        )
    if args.format_weight:
        functions.append(format_reward(well_formed=args.format_weight))
    if args.length_beta:
        functions.append(
            length_penalty(judge, beta=args.length_beta, window=args.length_window, answer_column=column, latency=True)
        )
    return functions


def _guard(function: Any, args: PGRPOConfig) -> Any:
    """Reward models stay as they are; functions get defined failures."""
    if isinstance(function, str | nn.Module):
        return function
    return guarded(function, timeout_s=args.reward_timeout_s, on_error=args.reward_errors)  # type: ignore[arg-type]


def _require_column(dataset: Any, name: str) -> None:
    columns = getattr(dataset, "column_names", None)
    for needed in ("prompt", name):
        if columns is not None and needed not in columns:
            raise ValueError(
                f"train_dataset must have the columns 'prompt' and {name!r}, got {columns}; rename them, or set "
                "answer_column"
            )
