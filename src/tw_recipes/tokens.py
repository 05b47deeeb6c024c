"""The tags as single tokens: `add_tag_tokens` extends a tokenizer and initialises the rows of the model (SPEC 1)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tw_core.errors import ThreadWeaverError
from tw_core.tags import CONCLUSION, TAGS
from tw_recipes.support import unwrap


class TagTokenError(ThreadWeaverError, ValueError):
    """A tokenizer or a model does not have the tags as single tokens."""


def missing_tags(tokenizer: Any) -> list[str]:
    """Tags that are not one token of `tokenizer`."""
    vocabulary = tokenizer.get_vocab()
    return [tag for tag in TAGS if tag not in vocabulary]


def require_tag_tokens(tokenizer: Any) -> None:
    """Raise `TagTokenError` unless every tag, the optional conclusion aside, is one token."""
    missing = [tag for tag in missing_tags(tokenizer) if tag not in TAGS[CONCLUSION:]]
    if missing:
        raise TagTokenError(
            f"the tokenizer lacks the tags {', '.join(missing)} as single tokens; call "
            "add_tag_tokens(model, tokenizer) and save both before training or decoding"
        )


def tag_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tags that the tokenizer has, in the order of `tw_core.TAGS`."""
    require_tag_tokens(tokenizer)
    missing = missing_tags(tokenizer)
    return [tokenizer.convert_tokens_to_ids(tag) for tag in TAGS if tag not in missing]


def add_tag_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Make each tag one special token and give it an embedding made of its word.

    A new row is the mean of the rows of the pieces of the tag's word ("Parallel", "/Parallel"); rows of an untied
    output head likewise. The matrices grow if they must and never shrink. Rows of tags that the tokenizer already had
    stay as they are, so a second call changes nothing. Call it before PEFT wrapping and before FSDP shards the model;
    under DeepSpeed ZeRO-3 the parameters are gathered for the change.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer, changed in place; save it beside the model.

    Returns:
        The ids of all tags, in the order of `tw_core.TAGS`.

    Raises:
        TagTokenError: The model is wrapped by PEFT, its matrices have fewer rows than the tokenizer had tokens, or the
            tokenizer has no token for a tag's word.
    """
    if hasattr(model, "peft_config"):
        raise TagTokenError(
            "add_tag_tokens must run before PEFT wraps the model; pass peft_config to the trainer later"
        )
    base = unwrap(model)
    matrices = _matrices(base)
    rows, known = _rows(matrices[0]), len(tokenizer)
    new = missing_tags(tokenizer)
    if rows < known and new:
        raise TagTokenError(
            f"the model has {rows} embedding rows but its tokenizer {known} tokens before the tags are added; resize "
            "the model to its own tokenizer first (model.resize_token_embeddings(len(tokenizer)))"
        )
    pieces = {tag: tokenizer(tag[1:-1], add_special_tokens=False)["input_ids"] for tag in TAGS}
    fresh = [tag for tag in TAGS if tag in new or tokenizer.convert_tokens_to_ids(tag) >= rows]
    if wordless := [tag for tag in fresh if not pieces[tag]]:
        raise TagTokenError(
            f"the tokenizer must write the word of {wordless[0]}, whose rows its embedding is made of, got no token; "
            "give it an unknown token or the letters"
        )
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in new], special_tokens=True)
    ids = tag_token_ids(tokenizer)
    if max(ids) >= rows:
        if any(isinstance(matrix, DTensor) for matrix in matrices):
            raise TagTokenError("add_tag_tokens cannot grow an FSDP-sharded model; call it before sharding")
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        matrices = _matrices(base)
    for matrix in matrices:
        _set_rows(matrix, {index: pieces[tag] for tag, index in zip(TAGS, ids, strict=True) if tag in fresh})
    return ids


def _matrices(base: Any) -> list[Tensor]:
    """Input embeddings, and the output head if it is another parameter."""
    inputs, head = base.get_input_embeddings(), base.get_output_embeddings()
    weights = [inputs.weight]
    if head is not None and head.weight is not inputs.weight:
        if _rows(head.weight) != _rows(inputs.weight):
            raise TagTokenError(
                f"the output head has {_rows(head.weight)} rows and the embedding {_rows(inputs.weight)}; the model "
                "was resized by hand, resize both to the same number"
            )
        weights.append(head.weight)
    return weights


def _rows(weight: Tensor) -> int:
    return getattr(weight, "ds_shape", weight.shape)[0]


@contextmanager
def _whole(weight: Tensor) -> Iterator[Tensor]:
    """The full matrix, writable; changes reach a ZeRO-3 or FSDP2 shard when the block ends."""
    if isinstance(weight, DTensor):
        full = weight.full_tensor()
        yield full
        weight.copy_(distribute_tensor(full, weight.device_mesh, weight.placements))
        return
    gather: Any = nullcontext()
    if hasattr(weight, "ds_id"):
        import deepspeed

        gather = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
    with gather:
        yield weight


@torch.no_grad()
def _set_rows(weight: Tensor, pieces: dict[int, list[int]]) -> None:
    if not pieces:
        return
    with _whole(weight) as full:
        for row, ids in pieces.items():
            full[row] = full[ids].float().mean(dim=0).to(full.dtype)
