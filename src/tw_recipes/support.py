"""Which models may read packed tries: a static check of the architecture and a numeric probe.

The static check finds what a short probe cannot (windows, chunks and states longer than the probe); the probe finds
what reading a config cannot (an option that the config states and the model ignores).
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tw_core import ReasoningTrie
from tw_core.errors import ThreadWeaverError
from tw_recipes import hybrid

logger = logging.getLogger(__name__)

# Kinds of layers that follow a trie: softmax attention, and layers that mix nothing along the row.
EXACT_LAYERS = {"attention", "full_attention", "mlp", "moe", "sliding_attention"}


class UnsupportedModelError(ThreadWeaverError, ValueError):
    """A packed trie through this model would not equal its sequences run one by one."""


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside torch.compile, DDP, FSDP and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers of a model, wrapped or not, that activation checkpointing treats as one each."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_architecture(model: nn.Module) -> None:
    """Refuse an architecture with a layer that does not follow the trie.

    Raises:
        UnsupportedModelError: Naming the model, the layer and the reason.
    """
    base = unwrap(model)
    reasons = _prompt_learning(model) + _attention_problems(base)
    recurrent = _recurrence_problems(base)
    if recurrent and not reasons:
        why = hybrid.refusal(base)
        reasons = [f"{' and '.join(recurrent)}: {why}"] if why else []
    if reasons:
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot read packed tries: {'; '.join(reasons[:4])}. "
            "Train it on expanded sequences, or choose a model with softmax attention in every layer"
        )


def _prompt_learning(model: nn.Module) -> list[str]:
    peft = model
    while not hasattr(peft, "peft_config") and isinstance(getattr(peft, "module", None), nn.Module):
        peft = peft.module
    configs = getattr(peft, "peft_config", None)
    if not isinstance(configs, dict):
        return []
    return [
        f"the PEFT adapter {name!r} is prompt learning ({config.peft_type}), whose virtual tokens have no place in the "
        "trie; use LoRA"
        for name, config in configs.items()
        if getattr(config, "is_prompt_learning", False)
    ]


def _attention_problems(base: PreTrainedModel) -> list[str]:
    config = base.config
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder model, and the encoder is not causal")
    modalities = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    if modalities:
        reasons.append(f"it has a {modalities[0]}; load the text model (its ForCausalLM class) instead")
    if not base._can_set_attn_implementation():
        layer = next(
            (f"{n} ({type(m).__name__})" for n, m in base.named_modules() if "Attention" in type(m).__name__), ""
        )
        reasons.append(f"its attention {layer} does not use transformers' AttentionInterface".replace("  ", " "))
    text = config.get_text_config()
    for index, kind in enumerate(getattr(text, "layer_types", None) or []):
        if kind not in EXACT_LAYERS and not _is_recurrent_kind(kind):
            reasons.append(f"layer {index} is {kind!r}, which is not full or sliding-window attention")
            break
    return reasons


def _is_recurrent_kind(kind: str) -> bool:
    return any(word in kind for word in ("linear", "conv", "mamba", "recurrent", "ssm"))


def _recurrence_problems(base: PreTrainedModel) -> list[str]:
    text = base.config.get_text_config()
    problems = [
        f"layer {index} is {kind!r}"
        for index, kind in enumerate(getattr(text, "layer_types", None) or [])
        if _is_recurrent_kind(kind)
    ][:1]
    for name, module in base.named_modules():
        if isinstance(module, nn.Conv1d):
            problems.append(f"{name} is a convolution along the row")
        elif "A_log" in module._parameters:
            problems.append(f"{name} ({type(module).__name__}) carries a recurrent state")
        elif isinstance(module, PreTrainedModel) and module._is_stateful:
            problems.append(f"{type(module).__name__} is declared stateful by transformers")
        else:
            continue
        break
    return problems


def _cannot_run_forward(base: nn.Module) -> str | None:
    if any(parameter.is_meta for parameter in base.parameters()):
        return "its parameters are on the meta device"
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        return "its parameters are partitioned by DeepSpeed ZeRO-3"
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true" and os.environ.get("RANK", "0") != "0":
        return "only rank 0 holds its weights"
    return None


def probe_exactness(model: nn.Module) -> float:
    """Compare the logits of a packed trie with those of its sequences run one by one through the stock path.

    The trie is nested and forks three times. In float32 the largest error over the rows is compared; below that the
    median, since rounding may send single tokens of a mixture-of-experts model to other experts.

    Args:
        model: A model after `install`.

    Returns:
        The relative error, 0.0 if no forward can run (ZeRO-3 or meta parameters; logged).

    Raises:
        UnsupportedModelError: The error exceeds 1e-3 (float32, float64) or 5e-2 (half precision).
    """
    base = unwrap(model)
    obstacle = _cannot_run_forward(base)
    if obstacle:
        logger.warning("the numeric probe of %s is skipped: %s", type(base).__name__, obstacle)
        return 0.0
    weight = base.get_input_embeddings().weight
    sequences = _probe_sequences(base.config.get_text_config().vocab_size)
    packed = ReasoningTrie.from_sequences(sequences).pack()
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        with torch.no_grad():
            together = _logits(_run_packed(model, packed, weight.device))
            errors = []
            for index, sequence in enumerate(sequences):
                alone = _logits(model(input_ids=torch.tensor([sequence], device=weight.device), use_cache=False))
                rows = packed.sequence_rows(index).to(alone.device)
                scale = alone.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
                errors.append((together[rows] - alone).norm(dim=-1) / scale)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot read packed tries: the probe failed with {type(error).__name__}: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
    by_row = torch.cat(errors)
    precise = weight.dtype in (torch.float32, torch.float64)
    error = float(by_row.max() if precise else by_row.median())
    limit = 1e-3 if precise else 5e-2
    if not error <= limit:
        layer = _first_wrong_layer(model, packed, sequences, limit)
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot read packed tries: the logits of a probe trie differ from those of its "
            f"sequences by {error:.1e} relative (limit {limit:.0e}); {layer} does not "
            "follow the trie"
        )
    return error


def _run_packed(model: nn.Module, packed: Any, device: torch.device, **options: Any) -> Any:
    return model(
        input_ids=packed.input_ids[None].to(device),
        position_ids=packed.position_ids[None].to(device),
        subtree_end=packed.subtree_end[None].to(device),
        use_cache=False,
        **options,
    )


def _first_wrong_layer(model: nn.Module, packed: Any, sequences: list[list[int]], limit: float) -> str:
    """Name the first layer whose output on the last probe sequence is wrong, for the error message."""
    device = unwrap(model).get_input_embeddings().weight.device
    rows = packed.sequence_rows(len(sequences) - 1).to(device)
    with torch.no_grad():
        together = _run_packed(model, packed, device, output_hidden_states=True).hidden_states
        ids = torch.tensor([sequences[-1]], device=device)
        alone = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for index, (left, right) in enumerate(zip(together, alone, strict=True)):
        if (left[0, rows] - right[0]).norm() > limit * right[0].norm():
            return f"layer {index - 1}" if index else "the embedding"
    return "a layer"


def _logits(output: Any) -> Tensor:
    return (output.logits if hasattr(output, "logits") else output[0])[0].float()


def _probe_sequences(vocab_size: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    low, high = vocab_size // 8, max(vocab_size // 8 + 2, vocab_size * 7 // 8)

    def tokens(count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=draw).tolist()

    trunk, left, other = tokens(9), tokens(6), tokens(7)
    return [
        trunk + left + tokens(5),
        trunk + left + tokens(8),
        trunk + tokens(11),
        other + tokens(4),
        other + tokens(6),
    ]
