"""Tiny random models, one factory per family: `tiny_model("qwen3")`. Two layers, 97 tokens, float32, eval mode."""

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

# family -> (config class, model class, options beside _BASE; ... leaves a base option out)
ATTENTION_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MOE, "router_aux_loss_coef": 0.0}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral_window": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "gemma2_softcap": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 5,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "gpt_oss_sinks": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "router_aux_loss_coef": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3_mla": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "head_dim": 4,
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"partial_rotary_factor": 0.5}),
    "opt_decoder": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
}

_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
HYBRID_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_LINEAR, **_MOE, "shared_expert_intermediate_size": 16, "router_aux_loss_coef": 0.0},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _LINEAR),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
}

_SSM: dict[str, Any] = {"state_size": 4, "conv_kernel": 4, "expand": 2}
UNSUPPORTED_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 8,
        },
    ),
    "jamba": ("JambaConfig", "JambaForCausalLM", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "mamba": ("MambaConfig", "MambaForCausalLM", _SSM),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", _SSM),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"context_length": 64, "attention_hidden_size": 32}),
    "xlstm": ("xLSTMConfig", "xLSTMForCausalLM", {"num_heads": 4, "num_blocks": 2, "qk_dim_factor": 0.5}),
    "recurrent_gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {"lru_width": 32, "num_hidden_layers": 3}),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_head": 4, "n_layer": 2}),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"head_dim": ...}),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2, "dff": 48}),
    "openai_gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}),
    "olmoe_stray_window": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3, "router_aux_loss_coef": 0.0},
    ),
}

_ALL = {**ATTENTION_FAMILIES, **HYBRID_FAMILIES, **UNSUPPORTED_FAMILIES}


def tiny_model(
    family: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """A random model of `family` in eval mode; `options` go to its config."""
    config_name, model_name, own = _ALL[family]
    fields = {name: value for name, value in {**_BASE, **own, **options}.items() if value is not ...}
    config = getattr(transformers, config_name)(**fields)
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).to(dtype).eval()
    # Default initialisation (std 0.02) leaves the logits nearly flat; larger weights make errors visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.mul_(4.0)
            elif "sinks" in name:
                parameter.normal_()
    return model


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in float64 throughout, rotary angles apart, which every engine makes in float32.

    torch's RMSNorm takes the place of the model's own, which rounds to float32 forward and backward.
    """
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, norm)
    return model
