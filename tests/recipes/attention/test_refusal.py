"""What `install` and an installed model refuse, and what the error says."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from tests.support.models import HYBRID_FAMILIES, UNSUPPORTED_FAMILIES, tiny_model
from tw_recipes import UnsupportedModelError, hybrid, install, uninstall
from tw_recipes.attention import is_installed

# peft asks transformers for a property that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")

REASONS = {
    "llama4": "layer 0 is 'chunked_attention'",
    "jamba": "layer 0 is 'linear_attention'.*jamba has recurrent layers",
    "mamba": "layer 0 is 'linear_attention'.*recurrent",
    "falcon_mamba": "layer 0 is 'linear_attention'.*recurrent",
    "rwkv": r"rwkv\.blocks\.0\.attention \(RwkvSelfAttention\) does not use transformers' AttentionInterface",
    "xlstm": "stateful",
    "recurrent_gemma": "layer 0 is 'linear_attention'",
    "minimax": "layer 1 is 'linear_attention'",
    "falcon_h1": "layer 0 is 'hybrid'",
    "bloom": "BloomAttention",
    "mpt": "MptAttention",
    "falcon": "FalconAttention",
    "openai_gpt": "does not use transformers' AttentionInterface",
    "t5": "encoder-decoder",
    "olmoe_stray_window": "probe trie differ .* layer 0 does not follow the trie",
}


@pytest.mark.parametrize("family", REASONS)
def test_unsupported_architectures_are_refused_with_the_layer(family):
    model = tiny_model(family)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=REASONS[family]):
        install(model)
    assert not is_installed(model)
    assert model.config._attn_implementation == before


def test_every_unsupported_family_that_we_know_is_tested():
    # CTRL looks old-fashioned but uses the interface and is exact.
    assert set(UNSUPPORTED_FAMILIES) - set(REASONS) == {"ctrl"}
    assert is_installed(install(tiny_model("ctrl")))


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_hybrids_need_the_optional_package(family, monkeypatch):
    monkeypatch.setattr(hybrid, "available", lambda: False)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 is .*threadweaver\[hybrid\]"):
        install(tiny_model(family))


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["prompt", "prefix"],
)
def test_prompt_learning_is_refused(config):
    with pytest.raises(UnsupportedModelError, match=r"prompt learning.*use LoRA"):
        install(get_peft_model(tiny_model("qwen3"), config))


def test_the_probe_sees_a_layer_that_ignores_the_trie(monkeypatch):
    import tw_recipes.attention as attention

    original = attention.trie_attention

    def causal(q, k, v, subtree_end, **options):
        return original(q, k, v, torch.full_like(subtree_end, len(subtree_end)), **options)

    monkeypatch.setattr(attention, "trie_attention", causal)
    model = tiny_model("qwen3")
    with pytest.raises(UnsupportedModelError, match="layer 0 does not follow the trie"):
        install(model)
    assert not is_installed(model)


def _row(**changes):
    row = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "position_ids": torch.tensor([[0, 1, 1]]),
        "subtree_end": torch.tensor([[3, 2, 3]], dtype=torch.int32),
        "use_cache": False,
    }
    return {name: value for name, value in (row | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 3, dtype=torch.long)}, "attention_mask and subtree_end exclude each other"),
        ({"position_ids": None}, "subtree_end needs position_ids"),
        ({"subtree_end": None, "target_rows": torch.tensor([[1]])}, "target_rows was given without subtree_end"),
        ({"subtree_end": torch.tensor([[3, 2]])}, r"must both have shape \(1, N\), got \(1, 2\) and \(1, 3\)"),
        ({"subtree_end": torch.tensor([3, 2, 3])}, r"must both have shape \(1, N\)"),
    ],
)
def test_bad_calls_are_refused(changes, message):
    model = install(tiny_model("llama"))
    with pytest.raises(ValueError, match=message):
        model(**_row(**changes))


def test_attention_dropout_is_refused_in_training():
    model = install(tiny_model("llama", attention_dropout=0.1))
    model(**_row())  # no dropout in eval mode
    with pytest.raises(ValueError, match=r"attention dropout must be 0 on a packed trie, got 0.1.*attention_dropout"):
        model.train()(**_row())


def test_unknown_attention_options_are_refused():
    model = install(tiny_model("llama"))
    with pytest.raises(ValueError, match="LlamaAttention passes cu_seq_lens_q to its attention"):
        model(**_row(cu_seq_lens_q=torch.tensor([0, 3])))


def test_a_changed_implementation_is_noticed():
    model = install(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"'sdpa', not 'trie_auto'.*install\(model\) again"):
        model(**_row())
    uninstall(model)


def test_only_transformers_models():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel"):
        install(torch.nn.Linear(2, 2))


def test_an_unknown_implementation_is_refused_and_the_model_stays_as_it_was():
    """The probe failed with it, which was told as a fault of the model, and uninstalled what was there."""
    model = install(tiny_model("qwen3"))
    with pytest.raises(ValueError, match=r"impl must be one of auto, hopper, .*, reference, got 'nope'; correct"):
        install(model, impl="nope")
    assert is_installed(model)


def test_lora_is_accepted():
    assert is_installed(install(get_peft_model(tiny_model("qwen3"), LoraConfig(task_type="CAUSAL_LM"))))
