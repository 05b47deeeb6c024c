r"""`threadweaver sft`: from a model and a data set to a saved model that stock transformers, vLLM and SGLang load.

    threadweaver sft --config examples/sft/qwen3_8b_lora_1gpu.yaml --dataset_name trajectories.jsonl
    accelerate launch --config_file examples/sft/fsdp2.yaml \
        -m tw_recipes.cli sft --config examples/sft/qwen3_8b_8gpus.yaml

Options are those of `TrieSFTConfig`, TRL's `ModelConfig` and `SFTScriptArguments`; a YAML file (`--config`) and flags
may be mixed, flags win.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from trl import ModelConfig, TrlParser
from trl.trainer.utils import get_peft_config

from tw_core.errors import ThreadWeaverError
from tw_recipes.data import RowReadError, iter_rows, require_local
from tw_recipes.model_files import load_with_tags, model_options, placement, resume_point, save_trained
from tw_recipes.sft.config import TrieSFTConfig
from tw_recipes.sft.rows import row_format
from tw_recipes.sft.trainer import TrieSFTTrainer

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class SFTScriptArguments:
    """Data and output of `threadweaver sft`."""

    dataset_name: str = field(metadata={"help": "JSONL or Parquet file, a saved data set's folder, or a Hub data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Evaluation data; default: the same data set."}
    )
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; default: none."})
    chat: bool = field(default=False, metadata={"help": "Put a text prompt into the chat template, as the user's."})
    instruction: str = field(default="", metadata={"help": "Appended to each text prompt."})
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "With LoRA, also save the merged model (the adapter goes to OUTPUT_DIR/adapter)."},
    )


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """Read one split of a data set.

    Args:
        name: Path of a .jsonl, .json or .parquet file, folder of `save_to_disk`, or the name of a Hub data set.
        split: Split to read; a single file has only "train".
        config: Configuration of a Hub data set.

    Raises:
        FileNotFoundError: `name` looks like a file and does not exist.
        ValueError: The file cannot be read (the message names the line), or the saved data set has no such split.
    """
    path = Path(name)
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"dataset_name={name!r} does not exist; give the path of a JSONL or Parquet file")
        if split != "train":
            raise ValueError(
                f"{name} is a single file, whose only split is 'train', got {split!r}; give held-out rows a file of "
                "their own, eval_dataset_name"
            )
        try:
            return load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        except (DatasetGenerationError, StopIteration) as error:  # the latter for a file without a row
            raise ValueError(f"dataset_name={name!r} cannot be read: {_fault(path, error)}; repair it") from error
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(
                    f"split {split!r} is not in {name}, which has {sorted(loaded)}; set dataset_train_split"
                )
            return loaded[split]
        return loaded
    require_local("dataset_name", name)
    return load_dataset(name, config, split=split)


def ask(script: Any, row: Mapping[str, Any], number: int, column: str = "prompt") -> Any:
    """What a row asks: its messages, or its text with `script.instruction`, as a user's turn if `script.chat`.

    Raises:
        ValueError: It asks nothing; `number` says which row it is.
    """
    asked = row[column]
    if not asked:
        raise ValueError(
            f"{script.dataset_name}, row {number}: {column!r} must be text or messages, got {asked!r}; drop the row"
        )
    if not isinstance(asked, str):
        return asked
    text = asked + script.instruction
    return [{"role": "user", "content": text}] if script.chat else text


def with_instruction(data: Dataset, script: SFTScriptArguments) -> Dataset:
    """Rows of prompt and text with what `chat` and `instruction` ask for; with `chat` they become messages.

    Raises:
        ValueError: The rows have another form, or no prompt.
    """
    if not (script.chat or script.instruction):
        return data
    if row_format(data.column_names) != "text":
        raise ValueError(
            f"chat and instruction need the columns prompt and text, got {data.column_names}; leave them out"
        )

    def asked(row: Mapping[str, Any], place: int) -> dict[str, Any]:
        prompt = ask(script, row, place + 1)
        if not script.chat:
            return {"prompt": prompt}
        return {"messages": [*prompt, {"role": "assistant", "content": row["text"]}]}

    return data.map(asked, with_indices=True, remove_columns=["prompt", "text"] if script.chat else None)


def _fault(path: Path, error: Exception) -> str:
    """The first row that cannot be read, with its line; what `datasets` says where each row can be read alone."""
    if path.suffix != ".json":
        try:
            if not sum(1 for _ in iter_rows(path, ())):
                return "it has no row"
        except RowReadError as problem:
            return str(problem.bad)
    return str(error.__cause__ or error)


def run_sft(script: SFTScriptArguments, args: TrieSFTConfig, model_args: ModelConfig) -> TrieSFTTrainer:
    """Train and save; what `threadweaver sft` does.

    Returns:
        The trainer after training. `args.output_dir` holds the model and the tokenizer.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing; name a model or a path")
    checkpoint = resume_point(args)
    train = load_split(script.dataset_name, script.dataset_train_split, script.dataset_config)
    held_out = None
    if script.eval_dataset_name is not None or script.dataset_test_split is not None:
        source = script.eval_dataset_name or script.dataset_name
        held_out = load_split(source, script.dataset_test_split or "train", script.dataset_config)
        held_out = with_instruction(held_out, replace(script, dataset_name=source))
    options = model_options(model_args, args.trust_remote_code)
    model, tokenizer = load_with_tags(name, options | placement(model_args))
    peft_config = get_peft_config(model_args)
    trainer = TrieSFTTrainer(
        model,
        args,
        train_dataset=with_instruction(train, script),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    save_trained(trainer, name, options, merge_adapter=script.merge_adapter)
    return trainer


def main(argv: Sequence[str]) -> int:
    """Parse flags and YAML, train, and return the exit status."""
    parser = TrlParser((SFTScriptArguments, TrieSFTConfig, ModelConfig), prog="threadweaver sft")
    try:
        script, args, model_args = parser.parse_args_and_config(list(argv))
        run_sft(script, args, model_args)
    except (ThreadWeaverError, OSError, ValueError) as error:
        print(f"threadweaver sft: {error}", file=sys.stderr)
        return 1
    return 0
