"""LoRA beside trained tag rows: only those rows move, tied and untied; merged and reloaded the logits are the same."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.support.models import tiny_model
from tests.support.sft import byte_tokenizer, common_options
from tests.support.text import FORK_ROWS
from tw_recipes import TrieSFTConfig, TrieSFTTrainer, add_tag_tokens
from tw_recipes.sft.trainer import _train_tag_rows


def _trainer(tmp_path, tied, lora=None, **options):
    model, tokenizer = tiny_model("qwen3", vocab_size=272, tie_word_embeddings=tied), byte_tokenizer()
    ids = add_tag_tokens(model, tokenizer)
    trainer = TrieSFTTrainer(
        model,
        TrieSFTConfig(
            **common_options(tmp_path, {"learning_rate": 1e-2, "max_steps": 3, "max_length": 512, **options})
        ),
        train_dataset=Dataset.from_list(FORK_ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **(lora or {})),
    )
    return trainer, ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_tag_rows_are_trained_merged_and_reloaded(tied, checkpointing, tmp_path):
    trainer, ids = _trainer(tmp_path, tied, gradient_checkpointing=checkpointing)
    base = trainer.model.get_base_model()
    tables = [base.get_input_embeddings(), base.get_output_embeddings()][: 1 if tied else 2]
    before = [table.original_module.weight.detach().clone() for table in tables]
    trainer.train()
    merged = trainer.model.merge_and_unload()
    tables = [merged.get_input_embeddings().weight] + ([] if tied else [merged.get_output_embeddings().weight])
    for table, old in zip(tables, before, strict=True):
        moved = (table != old).any(dim=1).nonzero()[:, 0].tolist()
        assert set(moved) <= set(ids)
        assert len(moved) >= 8  # every tag that the data holds
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    row = torch.tensor([[5, 6, ids[0], 7, ids[3]]])
    merged.eval().save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(input_ids=row).logits, merged(input_ids=row).logits)


def test_untied_head_rows_follow_the_loss(tmp_path):
    """A trained head row must change the logits that the fused head computes."""
    trainer, ids = _trainer(tmp_path, tied=False)
    assert sorted(trainer.model.peft_config["default"].trainable_token_indices) == ["embed_tokens", "lm_head"]
    trainer.train()
    deltas = {n: p for n, p in trainer.model.named_parameters() if "trainable_tokens_delta" in n}
    assert len(deltas) == 2
    assert all(torch.isfinite(delta).all() for delta in deltas.values())
    assert len(ids) == 10


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({}, {"embed_tokens": [1, 2]}),
        ({"modules_to_save": ["embed_tokens"]}, None),
        ({"trainable_token_indices": {"embed_tokens": [9]}}, {"embed_tokens": [9]}),
    ],
)
def test_a_config_that_decides_is_left_alone(lora, expected):
    config = LoraConfig(task_type="CAUSAL_LM", **lora)
    _train_tag_rows(tiny_model("qwen3", tie_word_embeddings=True), config, [1, 2])
    assert config.trainable_token_indices == expected


def test_tags_can_be_left_frozen(tmp_path):
    trainer, _ = _trainer(tmp_path, tied=False, train_tag_tokens=False)
    assert not [name for name, _ in trainer.model.named_parameters() if "trainable_tokens" in name]
