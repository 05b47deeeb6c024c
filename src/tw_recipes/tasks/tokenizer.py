"""A small tokenizer for a task's closed vocabulary: whole words, single tags, no merges.

Text is cut at the longest vocabulary entries (leftmost first), so that ids and text map one to one.
"""

import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tw_core import TAGS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
THINK = ("<think>", "</think>")
# For code that sends messages: the rendered chat is the prompt itself.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def build_tokenizer(pieces: Sequence[str], *, pattern: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are `pieces`, the tags, the two think tags, and pad, eos, unknown.

    Args:
        pieces: Distinct non-empty strings; where several match, the longest one is the token.
        pattern: A regular expression that the many pieces of one shape match, tried before the others. For speed: a
            list of thousands of alternatives is slow.

    Raises:
        ValueError: A piece is empty or stands twice.
    """
    vocabulary = [PAD, EOS, UNKNOWN, *TAGS, *THINK, *pieces]
    if len(set(vocabulary)) != len(vocabulary) or "" in vocabulary:
        twice = sorted({piece for piece in vocabulary if vocabulary.count(piece) > 1 or not piece})
        raise ValueError(f"pieces must be distinct, non-empty and no tags, got {twice}; drop them")
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token=UNKNOWN))
    shaped = set() if pattern is None else {piece for piece in pieces if re.fullmatch(pattern, piece)}
    longest_first = sorted({*pieces} - shaped, key=lambda piece: (-len(piece), piece))
    split = "|".join([*([pattern] if pattern is not None else []), *map(re.escape, longest_first)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[*TAGS, *THINK],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
