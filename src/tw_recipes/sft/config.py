"""`TrieSFTConfig`: TRL's SFTConfig plus what a packed trie needs; options that would break exactness are refused."""

from dataclasses import dataclass, field
from pathlib import Path

from trl import SFTConfig


@dataclass
class TrieSFTConfig(SFTConfig):
    """Options of `TrieSFTTrainer`, beside those of TRL's SFTConfig.

    `max_length` is the row budget of one packed forest, not a truncation length: nothing is truncated.
    """

    max_length: int | None = field(
        default=16384, metadata={"help": "Rows of one packed forest at most. Longer samples are split exactly."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Packed forests per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Packed forests per device in evaluation."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the collator reads all columns."}
    )
    pack_samples: bool = field(default=True, metadata={"help": "Pack several samples into one forest."})
    drop_invalid: bool = field(
        default=False, metadata={"help": "Drop and count malformed or over-long samples instead of stopping."}
    )
    attention_impl: str = field(
        default="auto",
        metadata={"help": "Implementation of trie attention: auto, triton, flex, varlen, dense, reference."},
    )
    train_tag_tokens: bool = field(
        default=True, metadata={"help": "With LoRA, also train the embedding (and untied head) rows of the tags."}
    )

    def __post_init__(self) -> None:
        if self.max_length is None:
            raise ValueError(
                "max_length must be an int (the rows of one packed forest), got None; set max_length=16384"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the columns of the trie; set it to False")
        for name, instead in (
            ("packing", "pack_samples=True packs tries"),
            ("padding_free", "a packed trie has no padding already"),
            ("eval_packing", "pack_samples=True packs tries"),
            ("assistant_only_loss", "messages train assistant turns only already"),
            ("label_smoothing_factor", "trie targets have no shifted logits"),
        ):
            if getattr(self, name):
                raise ValueError(f"{name} must be off in TrieSFTConfig, got {getattr(self, name)!r}: {instead}")
        template = self.chat_template_path
        if template is not None and not (template.endswith((".jinja", ".j2")) and Path(template).is_file()):
            raise ValueError(
                f"chat_template_path must be a .jinja or .j2 file that exists, got {template!r}: the tokens of a "
                "model's template would be added once the data is packed; write the template into a file"
            )
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()
        parallelism = self.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "context and sequence parallelism cut a packed row in pieces, and trie attention needs it whole; set "
                "cp_size=1 and sp_size=1, and use FSDP2 or ZeRO-3 to save memory"
            )
