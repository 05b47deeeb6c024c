"""Trie attention inside transformers models: `install`, `uninstall`, `native_attention`.

A call `model(input_ids, position_ids=depth, subtree_end=...)` reaches the backbone, where a forward pre-hook stacks
subtree_end and depth into one int32 *carrier* of shape (1, 1, 2, N) and passes it as `attention_mask`. Stock models
hand any 4-D mask to every layer as it is; our attention function recognises it by dtype and calls
`tw_kernels.trie_attention`. Whatever arrives without a carrier (generate, evaluation, padded batches) runs the
attention function and the mask function that the model had before. Dispatch is on data, never on state, so activation
checkpointing (which recomputes in the backward) sees what the forward saw.

Tests: tests/recipes/attention.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tw_kernels import available_impls, trie_attention
from tw_recipes import _compat, hybrid
from tw_recipes.support import check_architecture, probe_exactness, unwrap

_STATE = "_trie_installation"

# What the attention modules of transformers may pass along that does not change the result on a packed row.
_HARMLESS = {
    "cache",
    "cache_position",
    "is_causal",
    "layer_idx",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_value",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "scale",
    "use_cache",
    *hybrid.TREE_KWARGS,
}


def is_carrier(attention_mask: Tensor | None) -> bool:
    """Whether an attention mask is our int32 (1, 1, 2, N) stack of subtree_end and depth."""
    return (
        attention_mask is not None
        and attention_mask.dtype == torch.int32
        and attention_mask.ndim == 4
        and attention_mask.shape[-2] == 2
    )


def _attend(
    impl: str,
    fallback: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function behind the registered names; q (1, H, N, D), k and v (1, Hkv, N, D[v]) -> (1, N, H, Dv)."""
    if not is_carrier(attention_mask):
        stock = _stock_attention(module, fallback)
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout:
        raise ValueError(
            f"{type(module).__name__}: attention dropout must be 0 on a packed trie, got {dropout}; "
            "set the config's attention_dropout to 0.0 before building the model"
        )
    window = kwargs.pop("sliding_window", None)
    softcap = kwargs.pop("softcap", None)
    sinks = kwargs.pop("s_aux", None)
    if kwargs.get("is_causal") is False:
        raise ValueError(f"{type(module).__name__} asks for is_causal=False; a trie has only causal attention")
    unknown = sorted(name for name, given in kwargs.items() if name not in _HARMLESS and given is not None)
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which trie attention does not "
            "implement; train this model on expanded sequences"
        )
    subtree_end, depth = _rows_of(attention_mask)
    out = trie_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        subtree_end,
        position_ids=depth,
        scale=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        impl=impl,
    )
    return out[None], None


def _rows_of(carrier: Tensor) -> tuple[Tensor, Tensor]:
    """subtree_end and depth, (N,) each: the same tensor objects for every layer, so that their plan is built once."""
    if torch.compiler.is_compiling():
        return carrier[0, 0, 0], carrier[0, 0, 1]
    if not hasattr(carrier, "trie_rows"):
        # Views of `.data` do not refer back to the carrier, which therefore dies with its forward.
        carrier.trie_rows = tuple(carrier.data[0, 0].unbind())
    return carrier.trie_rows


def _stock_attention(module: nn.Module, fallback: str) -> Any:
    if fallback == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[fallback]


def _register(impl: str, fallback: str) -> str:
    """Register the pair (implementation, what to do without a trie) and return its name in transformers."""
    # The name must not contain "sdpa", "flash" or "flex_attention": transformers reads meaning into those.
    name = f"trie_{impl}" if fallback == "sdpa" else f"trie_{impl}_{fallback}"
    AttentionInterface.register(name, functools.partial(_attend, impl, fallback))
    AttentionMaskInterface.register(name, eager_mask if fallback == "eager" else sdpa_mask)
    return name


class _Installation:
    """What `install` left on a backbone: how to undo it, and the rows that the current call gathers."""

    def __init__(self, previous: str, name: str, follows_recurrence: bool):
        self.previous = previous
        self.name = name
        self.follows_recurrence = follows_recurrence
        self.target_rows: Tensor | None = None
        self.handles: list[Any] = []


def _before_backbone(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Turn `subtree_end` (and depth) into the carrier; remember `target_rows` for `_after_backbone`."""
    state: _Installation = getattr(backbone, _STATE)
    subtree_end = kwargs.pop("subtree_end", None)
    state.target_rows = target_rows = kwargs.pop("target_rows", None)
    if subtree_end is None:
        if target_rows is not None:
            raise ValueError("target_rows was given without subtree_end; pass both, from one PackedTrie")
        return args, kwargs
    depth = kwargs.get("position_ids")
    if depth is None:
        raise ValueError("subtree_end needs position_ids=PackedTrie.position_ids (the depths), got none")
    if kwargs.get("attention_mask") is not None:
        raise ValueError("attention_mask and subtree_end exclude each other: a packed trie has no padding mask")
    if subtree_end.ndim != 2 or subtree_end.shape[0] != 1 or depth.shape != subtree_end.shape:
        raise ValueError(
            f"subtree_end and position_ids must both have shape (1, N), got {tuple(subtree_end.shape)} and "
            f"{tuple(depth.shape)}; pack several tries into one row with PackedTrie.concat"
        )
    if backbone.config._attn_implementation != state.name:
        raise ValueError(
            f"the attention implementation is {backbone.config._attn_implementation!r}, not {state.name!r}: it was "
            "changed after install(model); call install(model) again"
        )
    carrier = torch.stack([subtree_end.int(), depth.int()], dim=1)[:, None]
    if state.follows_recurrence:
        kwargs |= hybrid.tree_kwargs(subtree_end[0], depth[0])
    return args, kwargs | {"attention_mask": carrier, "use_cache": False}


def _after_backbone(backbone: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Gather the hidden states that predict the targets, a row as often as it has targets."""
    state: _Installation = getattr(backbone, _STATE)
    rows, state.target_rows = state.target_rows, None
    if rows is None:
        return output
    hidden = output[0]
    gathered = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    if isinstance(output, tuple):
        return (gathered, *output[1:])
    output.last_hidden_state = gathered
    return output


def _backbone(model: nn.Module) -> PreTrainedModel:
    base = unwrap(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel (or wrap one), got {type(base).__name__}")
    # What every forward of the model goes through: OPT's head calls the decoder inside its base model.
    decoder = base.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else base.base_model


def install(model: nn.Module, *, impl: str = "auto", probe: bool = True) -> nn.Module:
    """Let a transformers model read packed tries; everything else it does stays as it was.

    Afterwards `model(input_ids, position_ids=depth, subtree_end=end, use_cache=False)`, each (1, N), attends along the
    trie. With `target_rows` (1, M) the backbone's hidden states are gathered to those rows, so that logits and
    `shift_labels` have shape (1, M). A call without `subtree_end` is the stock call. Installing again is free; with
    another `impl` it replaces the first one.

    Args:
        model: A `PreTrainedModel`, plain or wrapped by PEFT, DDP, FSDP or torch.compile.
        impl: Implementation of `tw_kernels.trie_attention`: "auto", "triton", "flex", "dense", …
        probe: Compare a packed trie with its sequences one by one (a few ms). False only where a forward cannot run.

    Returns:
        `model`.

    Raises:
        UnsupportedModelError: A layer would not follow the trie; the message names it and the reason.
        ImportError: transformers outside the tested range.
        ValueError: There is no implementation `impl`.
    """
    _compat.require("transformers")
    if impl not in (known := ("auto", *available_impls())):
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}; correct attention_impl")
    base, backbone = unwrap(model), _backbone(model)
    state: _Installation | None = getattr(backbone, _STATE, None)
    if state is not None:
        if base.config._attn_implementation == state.name == _register(impl, _fallback(state.previous)):
            return model
        uninstall(model)
    check_architecture(model)
    previous = base.config._attn_implementation
    name = _register(impl, _fallback(previous))
    state = _Installation(previous, name, follows_recurrence=hybrid.follow(base))
    setattr(backbone, _STATE, state)
    state.handles = [
        backbone.register_forward_pre_hook(_before_backbone, with_kwargs=True),
        backbone.register_forward_hook(_after_backbone, with_kwargs=True),
    ]
    base.set_attn_implementation(name)
    if probe:
        try:
            probe_exactness(model)
        except Exception:
            uninstall(model)
            raise
    return model


def _fallback(previous: str) -> str:
    # flash and flex functions look at the config's implementation name, which is ours now: sdpa takes their place.
    return "eager" if previous == "eager" else "sdpa"


def uninstall(model: nn.Module) -> nn.Module:
    """Undo `install`: the former attention implementation, no hooks. Without an installation, do nothing."""
    base, backbone = unwrap(model), _backbone(model)
    state: _Installation | None = getattr(backbone, _STATE, None)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    delattr(backbone, _STATE)
    if state.follows_recurrence:
        hybrid.unfollow(base)
    if base.config._attn_implementation == state.name:
        base.set_attn_implementation(state.previous)
    return model


def is_installed(model: nn.Module) -> bool:
    """Whether `install` is in force on `model`."""
    return hasattr(_backbone(model), _STATE)


@contextmanager
def native_attention(model: nn.Module) -> Iterator[nn.Module]:
    """Run a block under the attention implementation that the model had before `install`.

    For code that accepts only known names, such as transformers' continuous batching. No backward may cross the end
    of the block: recomputation would run under another implementation than the forward did.
    """
    base, backbone = unwrap(model), _backbone(model)
    state: _Installation | None = getattr(backbone, _STATE, None)
    if state is None:
        yield model
        return
    base.set_attn_implementation(state.previous)
    try:
        yield model
    finally:
        base.set_attn_implementation(state.name)
