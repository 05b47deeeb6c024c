"""Training of the tiny models: TRL's SFTTrainer on whole sequences, TrieSFTTrainer on packed tries, same options.

Both take rows {"prompt", "text"} in the order given, each once, eight a step unless told otherwise: the sequential
model as stock TRL trains it, the fork/join model as a forest of that many tries a step.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tw_recipes import _compat
from tw_recipes.attention import uninstall
from tw_recipes.pipelines.checkpoints import Checkpoints
from tw_recipes.pipelines.optimizer import MuonAdamW
from tw_recipes.sft.config import TrieSFTConfig
from tw_recipes.sft.trainer import TrieSFTTrainer
from tw_recipes.support import decoder_layers

BATCH = 8
MUON_LR, ADAMW_LR = 0.02, 4e-3

Row = Mapping[str, Any]
OnStep = Callable[[int, str], None]
"""Called with the steps done and a line of figures."""


class Trained(NamedTuple):
    """What a stage of training did.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens that the model computed.
        targets: Tokens that carried loss.
        curve: (step, loss, token accuracy), means since the entry before.
    """

    steps: int
    tokens: int
    targets: int
    curve: list[tuple[int, float, float]]


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row] | Dataset,
    *,
    tries: bool,
    folder: Path,
    seed: int,
    lr_scale: float = 1.0,
    batch: int = BATCH,
    compiled: bool = False,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Train `model` in place, one pass over `rows`.

    Args:
        model: Stays usable as it was: what training installs on it is removed. On a GPU it trains in bfloat16.
        tokenizer: Of the rows' text.
        rows: A multiple of `batch` of them; with `tries` also a data set that `TrieSFTTrainer` takes.
        tries: Train on packed tries; False trains each text as one sequence.
        folder: For the trainer; nothing is kept there.
        seed: Of the trainer.
        lr_scale: Of both learning rates.
        batch: Rows of a step.
        compiled: Compile the layers with Inductor, for all lengths at once.
        on_step: For progress display.
        checkpoints: Of `folder`, to stop and go on; without them nothing can be continued.

    Raises:
        OutOfTime: The deadline of `checkpoints` has come.
        ValueError: `rows` does not divide into batches.
    """
    if not rows or len(rows) % batch:
        raise ValueError(f"rows must be a positive multiple of {batch}, got {len(rows)}")
    steps = len(rows) // batch
    on_cpu = model.device.type == "cpu"
    optimizer = MuonAdamW(model, muon_lr=MUON_LR * lr_scale, adamw_lr=ADAMW_LR * lr_scale)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1.0,  # unused: the optimizer brings its own two, which the schedule scales
        # Constant, then linear over the second half: a cosine freezes a run that leaves a plateau late.
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": steps // 2, "decay_type": "linear", "min_lr_ratio": 0.02},
        "warmup_steps": min(50, steps // 8),
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",  # the rows are random already
        "logging_steps": max(1, min(50, steps // 4)),
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "save_total_limit": 1,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        # On a GPU the next batches are read while a step runs; a CPU has no core to spare for it.
        "dataloader_num_workers": 0 if on_cpu else 2,
        "dataset_num_proc": packing_processes(len(rows), model.device.type),
        "seed": seed,
        **_compat.no_checkpointing(),
    }
    kwargs: dict[str, Any] = {"processing_class": tokenizer, "optimizers": (optimizer, None)}
    kwargs["callbacks"] = [_Progress(on_step)] if on_step is not None else []
    kwargs["callbacks"] += [checkpoints] if checkpoints is not None else []
    with _quiet_datasets(), contextlib.redirect_stdout(None), _compiled_layers(model, compiled):
        if tries:
            # On a CPU segment by segment is many times faster than the mask over the whole forest.
            impl = "varlen" if on_cpu else "auto"
            args = TrieSFTConfig(**options, pack_samples=False, attention_impl=impl)
            data = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
            trainer: SFTTrainer = TrieSFTTrainer(model, args, train_dataset=data, **kwargs)
        else:
            plain = Dataset.from_list([{"prompt": row["prompt"], "completion": row["text"]} for row in rows])
            trainer = SFTTrainer(model, SFTConfig(**options, max_length=None), train_dataset=plain, **kwargs)
        trainer.train(resume_from_checkpoint=checkpoints.last if checkpoints is not None else None)
    uninstall(model)
    if checkpoints is not None:
        checkpoints.finish()
    model.eval()
    curve = [
        (entry["step"], entry["loss"], entry["mean_token_accuracy"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    if not all(torch.isfinite(torch.tensor(loss)) for _, loss, _ in curve):
        raise FloatingPointError(f"the loss is not finite: {curve}; lower lr_scale={lr_scale}")
    return Trained(steps, *_count(trainer.train_dataset, tries), curve)


def compile_layers(model: nn.Module) -> list[nn.Module]:
    """Compile each decoder layer of `model` with Inductor, for all lengths at once; returns the layers."""
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
    return layers


@contextlib.contextmanager
def _compiled_layers(model: Any, compiled: bool) -> Iterator[None]:
    layers = compile_layers(model) if compiled else []
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # torch has no public way back


def packing_processes(count: int, device: str) -> int | None:
    """Processes that pack `count` rows, for `datasets.map`: one where they are few, or where the CPU trains."""
    return None if device == "cpu" or count < 1000 else min(16, os.cpu_count() or 1)


def _count(prepared: Dataset, tries: bool) -> tuple[int, int]:
    """(tokens computed, tokens trained) of a prepared data set, one pass."""
    table = prepared.with_format("arrow")[:]  # rows that were chosen or put in order, as `data.table` is not
    tokens = pc.sum(pc.list_value_length(table["input_ids"])).as_py()
    if tries:
        return tokens, pc.sum(pc.list_flatten(table["target_weights"])).as_py()
    return tokens, pc.sum(pc.not_equal(pc.list_flatten(table["labels"]), -100)).as_py()


class _Progress(TrainerCallback):
    def __init__(self, on_step: OnStep):
        self.on_step, self.figures = on_step, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.figures = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, self.figures)


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
