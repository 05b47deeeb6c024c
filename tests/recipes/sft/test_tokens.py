"""add_tag_tokens: one token a tag, rows made of the tag's word, never a smaller matrix, nothing on a second call."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.models import tiny_model
from tests.support.sft import BYTE_VOCAB, byte_tokenizer
from tw_core.tags import TAGS
from tw_recipes import add_tag_tokens
from tw_recipes.tokens import TagTokenError, require_tag_tokens, tag_token_ids


def _model(rows: int = BYTE_VOCAB, **options):
    return tiny_model("qwen3", vocab_size=rows, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [260, 300])
def test_rows_are_means_of_the_word(tied, rows):
    model, tokenizer = _model(rows, tie_word_embeddings=tied), byte_tokenizer()
    old = [matrix.weight.detach().clone() for matrix in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = add_tag_tokens(model, tokenizer)
    assert len(tokenizer) == 260 + len(TAGS)
    assert ids == [tokenizer.convert_tokens_to_ids(tag) for tag in TAGS]
    expected_rows = max(rows, len(tokenizer))
    assert model.config.vocab_size == expected_rows
    for matrix, before in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        assert matrix.weight.shape[0] == expected_rows
        assert torch.equal(matrix.weight[:260], before[:260])
        for tag, index in zip(TAGS, ids, strict=True):
            pieces = byte_tokenizer()(tag.strip("<>"), add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(matrix.weight[index], before[pieces].mean(dim=0))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_openers_and_closers_differ():
    model, tokenizer = _model(300), byte_tokenizer()
    rows = model.get_input_embeddings().weight[add_tag_tokens(model, tokenizer)]
    assert torch.pdist(rows).min() > 1e-3


def test_a_second_call_changes_nothing():
    model, tokenizer = _model(), byte_tokenizer()
    ids = add_tag_tokens(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    trained = model.get_input_embeddings().weight.detach().clone()
    assert add_tag_tokens(model, tokenizer) == ids
    assert torch.equal(model.get_input_embeddings().weight, trained)


def test_tags_are_saved_with_the_tokenizer(tmp_path):
    model, tokenizer = _model(), byte_tokenizer()
    ids = add_tag_tokens(model, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tag_token_ids(loaded) == ids
    assert loaded("a<Thread>b", add_special_tokens=False)["input_ids"][1] == loaded.convert_tokens_to_ids("<Thread>")
    # a fresh model for a tokenizer that has the tags already: its new rows are initialised
    fresh = _model(260)
    add_tag_tokens(fresh, loaded)
    pieces = loaded("Thread", add_special_tokens=False)["input_ids"]
    weight = fresh.get_input_embeddings().weight
    torch.testing.assert_close(weight[loaded.convert_tokens_to_ids("<Thread>")], weight[pieces].mean(dim=0))


def test_bad_models_and_tokenizers_are_refused():
    with pytest.raises(TagTokenError, match=r"lacks the tags <Parallel>.*call add_tag_tokens\(model, tokenizer\)"):
        require_tag_tokens(byte_tokenizer())
    with pytest.raises(TagTokenError, match=r"97 embedding rows but its tokenizer 260 tokens.*resize_token_embeddings"):
        add_tag_tokens(tiny_model("qwen3"), byte_tokenizer())
    model = _model(tie_word_embeddings=False)
    model.set_output_embeddings(torch.nn.Linear(32, 280, bias=False))
    with pytest.raises(TagTokenError, match=r"head has 280 rows and the embedding 262.*resized by hand"):
        add_tag_tokens(model, byte_tokenizer())


def test_a_tokenizer_without_letters_is_refused():
    """The mean over no piece is NaN: the model was spoiled without a word."""
    digits = Tokenizer(models.BPE(vocab={str(n): n for n in range(10)}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=digits)
    with pytest.raises(TagTokenError, match=r"must write the word of <Parallel>, .* got no token; give it an unknown"):
        add_tag_tokens(tiny_model("qwen3"), tokenizer)
    assert len(tokenizer) == 10


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
def test_peft_models_are_refused():
    with pytest.raises(TagTokenError, match="before PEFT wraps the model"):
        add_tag_tokens(get_peft_model(_model(), LoraConfig(task_type="CAUSAL_LM")), byte_tokenizer())
