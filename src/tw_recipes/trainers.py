"""What our trainers do to the model of a TRL trainer, once TRL has built it.

Tests: tests/recipes/sft/test_trainer.py, tests/recipes/sft/test_lora.py, tests/recipes/grpo/test_trainer.py.
"""

import logging
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from tw_recipes.attention import install

logger = logging.getLogger(__name__)


def prepare_for_tries(trainer: Any, *models: nn.Module) -> None:
    """Install trie attention on a trainer's models, and refuse or warn about what differs on tries.

    Args:
        trainer: A TRL trainer after its `__init__`, with `args.attention_impl`.
        *models: The model that it trains, then others that read tries (a reference).

    Raises:
        ValueError: The model drops attention out.
        UnsupportedModelError: A layer does not follow the trie.
    """
    dropout = getattr(trainer.model.config.get_text_config(), "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0.0 in the model's config, got {dropout}: trie attention has none; set "
            'model_init_kwargs={"attention_dropout": 0.0}'
        )
    head = trainer.model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        # PEFT wraps a head that is tied to trained token rows; TRL's fused head reads its bias.
        head.register_parameter("bias", None)
    if trainer.aux_loss_enabled:
        logger.warning(
            "the load-balancing loss of this mixture-of-experts model is taken over unique tokens, not over the "
            "expanded ones; set router_aux_loss_coef=0.0 for gradients that equal the expanded run"
        )
    impl = trainer.args.attention_impl
    for model in models:
        if hasattr(model, "_original_forward"):  # under the autocast of an earlier trainer, which the probe must not be
            extract_model_from_parallel(model, keep_fp32_wrapper=False)
        # Under FSDP the weights are still on the CPU here, where GPU implementations cannot be probed.
        install(model, impl=impl, probe=impl == "auto" or not trainer.is_fsdp_enabled)
