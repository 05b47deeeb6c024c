"""Everything that is not a packed trie stays as it was: generation, padded batches, saving, and after `uninstall`."""

import copy
import subprocess
import sys

import pytest
import torch

from tests.support.models import ATTENTION_FAMILIES, tiny_model
from tw_recipes import install, native_attention, uninstall
from tw_recipes.attention import is_installed


def _padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27], [0, 0, 31, 32, 33, 34, 35]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_padded_forward_and_greedy_generation_are_unchanged(family):
    model, batch = tiny_model(family), _padded_batch()
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
    install(model)
    torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), tokens)


def test_generation_is_unchanged_with_an_eager_model():
    model, batch = tiny_model("qwen3"), _padded_batch()
    model.set_attn_implementation("eager")
    logits = model(**batch, output_attentions=True)
    install(model)
    found = model(**batch, output_attentions=True)
    torch.testing.assert_close(found.logits, logits.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.attentions, logits.attentions, rtol=0, atol=0)


def test_install_twice_then_uninstall():
    model = tiny_model("qwen3")
    hooks = len(model.base_model._forward_pre_hooks), len(model.base_model._forward_hooks)
    install(install(model))
    assert model.config._attn_implementation == "trie_auto"
    assert len(model.base_model._forward_pre_hooks) == hooks[0] + 1
    install(model, impl="reference")
    assert model.config._attn_implementation == "trie_reference"
    assert len(model.base_model._forward_pre_hooks) == hooks[0] + 1
    uninstall(uninstall(model))
    assert not is_installed(model)
    assert model.config._attn_implementation == "sdpa"
    assert (len(model.base_model._forward_pre_hooks), len(model.base_model._forward_hooks)) == hooks


def test_native_attention_restores_our_name():
    model = install(tiny_model("qwen3"))
    with native_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "trie_auto"


def test_a_copy_of_an_installed_model_is_installed():
    model = install(tiny_model("qwen3"))
    clone = copy.deepcopy(model)
    row = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "position_ids": torch.tensor([[0, 1, 1]]),
        "subtree_end": torch.tensor([[3, 2, 3]]),
    }
    uninstall(model)
    alone = clone(input_ids=torch.tensor([[5, 7]])).logits
    torch.testing.assert_close(clone(**row, use_cache=False).logits[0, [0, 2]], alone[0])


def test_saved_model_needs_none_of_our_code(tmp_path):
    """Safetensors written from an installed model, read by plain transformers in another process: the same logits."""
    model = install(tiny_model("qwen3"))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.save(model(input_ids=ids).logits, tmp_path / "logits.pt")
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert "trie" not in (tmp_path / "model" / "config.json").read_text()
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
expected = torch.load({str(tmp_path / "logits.pt")!r})
assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits, expected)
ours = [name for name in sys.modules if name.partition(".")[0] in ("tw_core", "tw_kernels", "tw_recipes")]
assert not ours, ours
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
