"""The closed-vocabulary tokenizer: longest piece first, unknown text is visible, saving keeps the ids."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tw_core import TAGS, TagIds
from tw_recipes.tasks.tokenizer import THINK, build_tokenizer

PIECES = ["1a", "1", "a", " of ", " ", "\n", ":"]


def test_the_longest_piece_wins_and_unknown_text_is_unknown() -> None:
    tokenizer = build_tokenizer(PIECES)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("11a of a")) == ["1", "1a", " of ", "a"]
    assert tokenizer.unk_token_id in tokenizer.encode("1b")


def test_tags_are_single_tokens_and_survive_saving(tmp_path: Path) -> None:
    tokenizer = build_tokenizer([*PIECES, *"023456789."])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for tag in (*TAGS, *THINK):
        assert len(tokenizer.encode(tag)) == 1
    text = "<think>\n<Parallel>\n<Outlines>\n<Outline>1: a</Outline>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert TagIds.from_tokenizer(again) == TagIds.from_tokenizer(tokenizer)
    chat = [{"role": "user", "content": "1a"}, {"role": "assistant", "content": "a"}]
    assert again.apply_chat_template(chat, tokenize=False) == "1aa<eos>"


def test_pieces_must_be_distinct_and_no_tags() -> None:
    for pieces in (["a", "a"], ["a", ""], ["a", "<Thread>"]):
        with pytest.raises(ValueError, match="pieces must be distinct, non-empty and no tags"):
            build_tokenizer(pieces)
