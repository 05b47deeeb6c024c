"""`TrieGRPOConfig`: TRL's GRPOConfig plus the token budget of a forward; options that cannot be exact are refused.

Tests: tests/recipes/grpo/test_trainer.py.
"""

from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class TrieGRPOConfig(GRPOConfig):
    """Options of `TrieGRPOTrainer`, beside those of TRL's GRPOConfig."""

    max_tokens_per_forward: int = field(
        default=32768,
        metadata={"help": "Rows of one packed forward at most; must hold the longest prompt + completion."},
    )
    attention_impl: str = field(
        default="auto",
        metadata={"help": "Implementation of trie attention: auto, triton, flex, varlen, dense, reference."},
    )
    graph_rows: int = field(
        default=0,
        metadata={
            "help": "Replay the layers of forwards of up to so many rows as CUDA graphs (16384, say): faster where a "
            "step is bound by the host. Rows are padded by up to an eighth. 0: no graphs."
        },
    )
    verify_first_step: bool = field(
        default=False,
        metadata={"help": "Compare the first micro-batch with the unshared path of TRL and stop if they differ."},
    )

    def __post_init__(self) -> None:
        if self.max_tokens_per_forward < 2:
            raise ValueError(
                f"max_tokens_per_forward must be at least 2, got {self.max_tokens_per_forward}; set it to a few times "
                "the longest prompt + completion"
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True is not supported by TrieGRPOTrainer (TRL deprecates it, and it patches the "
                'layers that trie attention reads); use model_init_kwargs={"use_kernels": True}'
            )
        super().__post_init__()
        if self.graph_rows < 0 or (self.graph_rows and not self.gradient_checkpointing):
            raise ValueError(
                f"graph_rows must be 0, or a number of rows with gradient_checkpointing=True, got {self.graph_rows} "
                f"and gradient_checkpointing={self.gradient_checkpointing}: graphs replay checkpointed layers"
            )
