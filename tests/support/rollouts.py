"""A model folder, and scripted engines that answer its prompts: for `rollout` and `eval` without a trained model."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_model
from tests.support.sft import byte_tokenizer
from tw_core import TAGS, encode_units
from tw_recipes.decoding.engine import Request
from tw_recipes.decoding.scripted_engine import ScriptedEngine
from tw_recipes.tokens import add_tag_tokens

FORKED = (
    "Plan.\n<Parallel>\n<Outlines>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n</Outlines>\n"
    "<Thread>\n1: two by two is four, and so on\n</Thread><Thread>\n2: three\n</Thread>\n</Parallel>\nSo \\boxed{7}."
)


def tagged_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with the tags: 270 tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS], special_tokens=True)
    return tokenizer


def model_folder(path: Path) -> Path:
    """A random byte-level model with the tags, saved."""
    model, tokenizer = tiny_model("qwen3", vocab_size=260, max_position_embeddings=512), byte_tokenizer()
    add_tag_tokens(model, tokenizer)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def text_engine(tokenizer: Any, text: str = FORKED, latency: float = 0.0) -> ScriptedEngine:
    """Writes `text` for every prompt, call by call if it may fork, in one call if it may not."""
    eos = tokenizer.eos_token_id
    units = [unit.completion.tolist() for unit in encode_units(text, tokenizer)]
    whole = tokenizer.encode(text, add_special_tokens=False)
    outlines_close, thread = (tokenizer.convert_tokens_to_ids(tag) for tag in ("</Outlines>", "<Thread>"))
    header = tokenizer.encode("1:", add_special_tokens=False)

    def answer(request: Request) -> list[int]:
        context = request.context
        opened = np.flatnonzero(context == thread)
        if not len(opened) and outlines_close not in request.stop_ids:
            return [*whole, eos]
        if not len(opened):
            return [*units[0], eos]
        closed = np.count_nonzero(context == tokenizer.convert_tokens_to_ids("</Thread>"))
        if closed < len(opened):
            first = context[opened[-1] + 2 : opened[-1] + 2 + len(header)].tolist() == header
            return units[1] if first else units[2]
        return [*units[3], eos]

    return ScriptedEngine(answer, [eos], latency=(latency, 0.0), logprob=-0.5)
