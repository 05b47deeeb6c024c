"""Optimizer steps of TrieGRPOTrainer equal those of TRL's GRPOTrainer: gradients, loss, metrics, generated tokens."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from tests.support.grpo import (
    GROUP,
    PROMPTS,
    branching_rollouts,
    chain_rollouts,
    make_trainer,
    saved_model,
    token_reward,
    train,
)
from tests.support.models import tiny_model
from tests.support.sft import BYTE_VOCAB
from tests.support.tries import largest_error
from tw_recipes import TrieGRPOConfig, TrieGRPOTrainer
from tw_recipes.attention import is_installed
from tw_recipes.grpo import logps
from tw_recipes.grpo.logps import SharingError
from tw_recipes.support import UnsupportedModelError

TOLERANCE = 1e-5
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0, "init_lora_weights": False}
MOVING = {"num_iterations": 2, "learning_rate": 3e-1, "epsilon": 0.02}  # the second update is off-policy, and clips

CASES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo_temperature": {"loss_type": "bnpo", "temperature": 0.7},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", **MOVING},
    "two_iterations": MOVING,
    "two_iterations_grpo": {"loss_type": "grpo", **MOVING},
    "two_iterations_cispo": {"loss_type": "cispo", **MOVING},
    "reference_model": {"beta": 0.1, **MOVING},
    "lora_reference": {"beta": 0.1, "lora": LORA, **MOVING},
    "entropy_mask": {"top_entropy_quantile": 0.3},
    "entropy_bonus": {"entropy_coef": 0.1},
    "mask_truncated": {"mask_truncated_completions": True, "max_completion_length": 40},
    "off_policy_mask": {"off_policy_mask_threshold": 0.01, **MOVING},
    "pad_to_multiple": {"pad_to_multiple_of": 8},
    "accumulation": {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2},
    "micro_batch_within_group": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "micro_batch_cuts_groups": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
    "old_log_probs_before_accumulation": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": "grpo", **MOVING
    },
    "no_checkpointing": {"gradient_checkpointing": False},
    "reentrant_checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "moe": {"family": "qwen3_moe", **MOVING},
    "window": {"family": "mistral_window", **MOVING},
    "window_and_full": {"family": "gemma3", **MOVING},
    "softcap": {"family": "gemma2_softcap"},
    "sinks": {"family": "gpt_oss_sinks", **MOVING},
}  # fmt: skip
# Each covers what another case covers nearly.
SLOW = {
    "bnpo_temperature", "two_iterations_cispo", "two_iterations_grpo", "entropy_bonus", "off_policy_mask",
    "pad_to_multiple", "no_checkpointing", "reentrant_checkpointing", "softcap", "micro_batch_within_group",
}  # fmt: skip
# The extreme over the completions of a micro-batch, which is composed differently.
PER_MICRO_BATCH = {"clip_ratio/low_min", "clip_ratio/high_max"}


def _train_both(tmp_path, *, only_trie=None, lora=None, **options):
    runs = []
    for kind in ("stock", "trie"):
        extra = (only_trie or {}) if kind == "trie" else {}
        peft_config = lora and LoraConfig(**lora)
        trainer = make_trainer(kind, tmp_path / kind, peft_config=peft_config, **options, **extra)
        runs.append((trainer, *train(trainer)))
    return runs


def _assert_equal(stock, trie):
    assert len(stock[1]) == len(trie[1]) > 0
    for expected, found in zip(stock[1], trie[1], strict=True):
        assert largest_error(found, expected) < TOLERANCE
    for expected, found in zip(stock[2], trie[2], strict=True):
        accumulates = stock[0].args.gradient_accumulation_steps > 1
        for name in expected.keys() - {"step_time"} - (PER_MICRO_BATCH if accumulates else set()):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=TOLERANCE), name
    assert list(trie[0]._logs["completion"]) == list(stock[0]._logs["completion"])


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_steps_equal_stock_trl(case, tmp_path):
    stock, trie = _train_both(tmp_path, **CASES[case])
    _assert_equal(stock, trie)
    assert any(norm.norm() > 1e-3 for norm in trie[1][0].values())
    if "epsilon" in CASES[case] and trie[0].loss_type != "cispo":
        assert trie[2][1]["clip_ratio/region_mean"] > 0
    assert all(entry["sharing_ratio"] > 1 for entry in trie[2])


def test_compiled_layers_equal_stock_trl(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_model())
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    torch._dynamo.reset()
    options = {"rollout_func": chain_rollouts, "max_completion_length": 12}
    compiled = make_trainer("trie", tmp_path / "trie", model=model, **options)
    stock = make_trainer("stock", tmp_path / "stock", **options)
    _assert_equal((stock, *train(stock)), (compiled, *train(compiled)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma3", "gpt_oss_sinks", "mistral_window", "llama"])
@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_on_every_family(loss, family, tmp_path):
    # luspo sums over the tokens of a sequence, so its gradients are that much larger.
    own = {"importance_sampling_level": "sequence", "learning_rate": 3e-2} if loss == "luspo" else {}
    options = {**MOVING, "loss_type": loss, "beta": 0.05, "max_steps": 3, **own}
    _assert_equal(*_train_both(tmp_path, family=family, **options))


@pytest.mark.parametrize("budget", [60, 200])
def test_the_token_budget_changes_nothing(budget, tmp_path):
    stock, trie = _train_both(tmp_path, only_trie={"max_tokens_per_forward": budget}, **MOVING)
    _assert_equal(stock, trie)


class _Sampler:
    """Stands in for TRL's vLLM client: tokens drawn from a seed, and log-probs that are not the trainer's."""

    def __init__(self):
        self.draw = torch.Generator().manual_seed(0)

    def sync_weights(self):
        pass

    def generate(self, prompts, **_):
        lengths = torch.randint(2, 12, (len(prompts),), generator=self.draw).tolist()
        ids = [torch.randint(3, 90, (length,), generator=self.draw).tolist() for length in lengths]
        logps = [[[x] for x in (-6 - torch.rand(len(row), generator=self.draw)).tolist()] for row in ids]
        return prompts, ids, logps, None


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_importance_correction_for_another_sampler(mode, tmp_path):
    runs = []
    for kind in ("stock", "trie"):
        trainer = make_trainer(kind, tmp_path / kind, vllm_importance_sampling_mode=mode)
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, _Sampler(), -1
        runs.append((trainer, *train(trainer)))
    _assert_equal(*runs)
    assert runs[1][2][0]["sampling/sampling_logp_difference/max"] > 0.1


def test_evaluation_equals_stock_trl(tmp_path):
    found = []
    for kind in ("stock", "trie"):
        trainer = make_trainer(kind, tmp_path, per_device_eval_batch_size=GROUP)
        torch.manual_seed(3)
        found.append(trainer.evaluate(trainer.train_dataset))
    timed = ("runtime", "per_second", "time")
    shared = {name: value for name, value in found[0].items() if not name.endswith(timed)}
    assert {name: found[1][name] for name in shared} == pytest.approx(shared, rel=TOLERANCE, abs=TOLERANCE)


def test_old_log_probs_of_the_first_update_give_a_ratio_of_one(tmp_path):
    trainer = make_trainer("trie", tmp_path, num_iterations=2)
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": PROMPTS[i // GROUP]} for i in range(2 * GROUP)])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    ratio = (now.detach() - inputs["old_per_token_logps"]).exp()
    assert float((ratio - 1).abs().max()) < 2e-6
    assert float(now.detach().min()) < -1


def test_continuous_batching_generates(tmp_path):
    trainer = make_trainer(
        "trie",
        tmp_path,
        max_steps=1,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 64, "max_batch_tokens": 64},
    )
    _, metrics = train(trainer)
    assert metrics[0]["completions/mean_length"] > 1
    assert trainer.model.config._attn_implementation == "trie_auto"


def test_both_models_are_installed(tmp_path):
    trainer = make_trainer("trie", tmp_path, beta=0.1, attention_impl="dense")
    for model in (trainer.model, trainer.ref_model):
        assert is_installed(model)
        assert model.config._attn_implementation == "trie_dense"


@pytest.mark.parametrize("kind", ["chains", "branching", "lora"])
def test_verification_passes_and_is_logged_once(kind, tmp_path):
    options = {
        "chains": {"family": "gemma3"},
        "branching": {"rollout_func": branching_rollouts},
        "lora": {"peft_config": LoraConfig(**LORA)},
    }[kind]
    _, metrics = train(make_trainer("trie", tmp_path, verify_first_step=True, **options))
    assert 0 < metrics[0]["verified_logp_difference"] < 1e-4
    assert "verified_logp_difference" not in metrics[1]


def test_verification_finds_a_wrong_place(tmp_path, monkeypatch):
    planned = logps.plan_forwards

    def shifted(*args):
        return [forward._replace(slots=forward.slots.roll(1)) for forward in planned(*args)]

    monkeypatch.setattr(logps, "plan_forwards", shifted)
    trainer = make_trainer("trie", tmp_path, verify_first_step=True)
    with pytest.raises(SharingError, match=r"verify_first_step: .* largest difference"):
        trainer.train()


def test_refused_options(tmp_path):
    with pytest.raises(ValueError, match="use_liger_kernel=True is not supported"):
        TrieGRPOConfig(str(tmp_path), use_liger_kernel=True)
    with pytest.raises(ValueError, match="max_tokens_per_forward must be at least 2, got 1"):
        TrieGRPOConfig(str(tmp_path), max_tokens_per_forward=1)
    with pytest.raises(ValueError, match="auto_find_batch_size is not supported"):
        TrieGRPOConfig(str(tmp_path), auto_find_batch_size=True, use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args must be a TrieGRPOConfig, got GRPOConfig"):
        TrieGRPOTrainer(saved_model(), token_reward, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_refused_models(tmp_path):
    with pytest.raises(ValueError, match=r"attention_dropout must be 0.0 in the model's config, got 0.1"):
        make_trainer("trie", tmp_path, model_init_kwargs={"attention_dropout": 0.1})
    with pytest.raises(UnsupportedModelError, match="Llama4ForCausalLM cannot read packed tries"):
        make_trainer("trie", tmp_path, family="llama4")


def test_prompt_learning_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"adapter 'default' is prompt learning .*; use LoRA"):
        make_trainer("trie", tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_sequence_parallelism_is_refused(tmp_path):
    parallelism = SimpleNamespace(cp_enabled=True, sp_enabled=False)
    with pytest.raises(ValueError, match="does not support sequence-dim parallelism"):
        TrieGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, parallelism_config=parallelism)


def test_a_balance_loss_over_unique_tokens_is_announced(tmp_path, caplog):
    trainer = make_trainer("trie", tmp_path, family="qwen3_moe", router_aux_loss_coef=0.01, max_tokens_per_forward=60)
    assert "load-balancing loss of this mixture-of-experts model is taken over unique tokens" in caplog.text
    stock = make_trainer("stock", tmp_path, family="qwen3_moe", router_aux_loss_coef=0.01)
    found, expected = train(trainer)[1], train(stock)[1]
    assert found[0]["aux_loss"] == pytest.approx(expected[0]["aux_loss"], rel=0.2)
    assert found[0]["aux_loss"] != pytest.approx(expected[0]["aux_loss"], rel=1e-4)


def test_lora_beside_trained_rows_of_tied_embeddings(tmp_path):
    """PEFT wraps the head then, and TRL's fused head reads a bias that the wrapper lacks."""
    model = tiny_model("qwen3", vocab_size=BYTE_VOCAB, tie_word_embeddings=True)
    lora = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]})
    gradients, _ = train(make_trainer("trie", tmp_path, model=model, peft_config=lora))
    assert any("trainable_tokens" in name and gradient.any() for name, gradient in gradients[0].items())


def test_images_are_refused(tmp_path):
    trainer = make_trainer("trie", tmp_path)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="a trie holds text alone, got pixel_values"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids, 2, pixel_values=torch.zeros(1))


def test_a_sequence_over_the_budget_is_refused(tmp_path):
    trainer = make_trainer("trie", tmp_path, max_tokens_per_forward=20)
    with pytest.raises(ValueError, match="more than max_tokens_per_forward=20; raise it"):
        trainer.train()
