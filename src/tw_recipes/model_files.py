"""Models that commands load and save: with the tags as tokens, placed for the launch, adapters merged.

Tests: tests/recipes/sft/test_command.py, tests/recipes/sft/test_zero3.py, tests/recipes/grpo/test_pgrpo_command.py.
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig
from trl.trainer.utils import create_model_from_path, get_quantization_config

from tw_recipes.data import require_local
from tw_recipes.tokens import add_tag_tokens


def model_options(model_args: ModelConfig, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` that the flags ask for, without the placement."""
    options: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": trust_remote_code,
        "dtype": model_args.dtype,
    }
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    return options


def placement(model_args: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that depend on the launch: the device of quantized or distributed models."""
    state, quantization = PartialState(), get_quantization_config(model_args)
    if quantization is not None:
        return {"device_map": {"": state.local_process_index}, "quantization_config": quantization}
    return {"device_map": None} if state.num_processes > 1 else {}


def load_with_tags(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model and its tokenizer, both with the tags as single tokens."""
    require_local("model_name_or_path", name)
    tokenizer = AutoTokenizer.from_pretrained(
        name, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
    )
    model = create_model_from_path(name, **options)
    add_tag_tokens(model, tokenizer)
    return model, tokenizer


def resume_point(args: TrainingArguments) -> str | None:
    """The checkpoint that `args.resume_from_checkpoint` names: a folder, or for "true" the last one of `output_dir`.

    Raises:
        FileNotFoundError: It is not there.
    """
    wanted = str(args.resume_from_checkpoint)
    if wanted.lower() in ("none", "false"):
        return None
    if wanted.lower() == "true":
        last: str | None = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if last is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint=True needs a checkpoint in output_dir, got none in {args.output_dir!r}; leave "
                "it out to begin anew"
            )
        return last
    if not Path(wanted).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint must be the folder of a checkpoint, or true for the last one of output_dir, got "
            f"{wanted!r}: there is no such folder; check the path"
        )
    return wanted


def save_trained(trainer: Trainer, name: str, options: dict[str, Any], *, merge_adapter: bool = True) -> None:
    """Save the model and the tokenizer to `output_dir`; an adapter to OUTPUT_DIR/adapter and, merged, to `output_dir`.

    Args:
        trainer: After training.
        name: What the model was loaded from.
        options: Its `model_options`.
        merge_adapter: Whether an adapter is merged too.
    """
    output_dir = trainer.args.output_dir
    if trainer.is_fsdp_enabled:  # in the sharded form of checkpoints transformers would write no model at all
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if not isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
        trainer.save_model(output_dir)
        return
    adapter = str(Path(output_dir) / "adapter")
    trainer.save_model(adapter)
    if merge_adapter and PartialState().is_main_process:
        # Merge into a fresh copy: the trained one may be sharded or quantized. Under ZeRO-3 transformers would
        # partition this one too, by calls in which all ranks must take part.
        unset_hf_deepspeed_config()
        base, _ = load_with_tags(name, options | {"device_map": "cpu"})
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output_dir)
        trainer.processing_class.save_pretrained(output_dir)
    PartialState().wait_for_everyone()
