"""Ten optimizer steps of TrieSFTTrainer equal ten of TRL's SFTTrainer on the expanded units."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from tests.support.sft import (
    byte_tokenizer,
    common_options,
    logged,
    parameters,
    stock_trainer,
    trajectories,
    trie_trainer,
)
from tests.support.tries import largest_error
from tw_recipes import TrieCollator, TrieSFTConfig, TrieSFTTrainer, install, prepare_dataset

TOLERANCE = 1e-5
SAMPLES = trajectories(20, 3)

CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "batch": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "no_checkpointing": {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    "dft": {"loss_type": "dft", "gradient_accumulation_steps": 2},
}


def _train_both(tmp_path, family="qwen3", lora=None, samples=SAMPLES, **options):
    trainers = []
    for build in (stock_trainer, trie_trainer):
        trainer = build(tiny_model(family), samples, tmp_path, peft_config=lora and LoraConfig(**lora), **options)
        trainer.train()
        trainers.append(trainer)
    return trainers


def _assert_equal_runs(stock, ours):
    assert largest_error(parameters(ours.model), parameters(stock.model)) < TOLERANCE
    for name in ("loss", "grad_norm", "num_tokens"):
        assert logged(ours, name) == pytest.approx(logged(stock, name), rel=TOLERANCE), name


def test_ten_steps_of_compiled_layers_equal_stock(tmp_path):
    """`layer.compile()`: one graph serves all layers and lengths, under activation checkpointing too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    ours = trie_trainer(model, SAMPLES, tmp_path, gradient_checkpointing=True)
    ours.train()
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6  # of 10 steps with other lengths
    stock = stock_trainer(tiny_model("qwen3"), SAMPLES, tmp_path, gradient_checkpointing=True)
    stock.train()
    _assert_equal_runs(stock, ours)


@pytest.mark.slow
# Dynamo instantiates the function behind TRL's head.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_ten_compiled_steps_equal_stock(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the trainer sets it, for every trainer that follows
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    ours = trie_trainer(tiny_model("qwen3"), SAMPLES, tmp_path, **options)
    ours.train()
    stock = stock_trainer(tiny_model("qwen3"), SAMPLES, tmp_path)
    stock.train()
    _assert_equal_runs(stock, ours)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_stock(case, tmp_path):
    stock, ours = _train_both(tmp_path, **CASES[case])
    start = parameters(tiny_model("qwen3"))
    assert largest_error(parameters(stock.model), start) > 1e-2  # the run has moved
    _assert_equal_runs(stock, ours)
    # one micro-batch a step makes the logged means of token metrics comparable
    if case == "plain":
        for name in ("entropy", "mean_token_accuracy"):
            assert logged(ours, name) == pytest.approx(logged(stock, name), rel=1e-4), name


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss_sinks", "qwen3_moe"])
def test_other_families_equal_stock(family, tmp_path):
    _assert_equal_runs(*_train_both(tmp_path, family, gradient_accumulation_steps=2, max_steps=5))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_equals_stock(checkpointing, tmp_path):
    lora = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    _assert_equal_runs(*_train_both(tmp_path, lora=lora, gradient_checkpointing=checkpointing))


def test_packing_across_samples_changes_nothing(tmp_path):
    """One forest of all samples a step: the same as all units in one stock batch."""
    samples = SAMPLES[:6]
    stock, ours = _train_both(tmp_path, samples=samples, per_device_train_batch_size=6)
    packed = trie_trainer(tiny_model("qwen3"), samples, tmp_path, pack_samples=True)
    assert len(packed.train_dataset) == 1
    packed.train()
    _assert_equal_runs(stock, packed)
    _assert_equal_runs(stock, ours)


def test_stock_trainer_with_our_collator(tmp_path):
    """No subclass: SFTTrainer, TrieCollator and install, as in docs/sft.md."""
    stock = stock_trainer(tiny_model("qwen3"), SAMPLES, tmp_path)
    dataset, _ = prepare_dataset(Dataset.from_dict({"units": SAMPLES}), max_tokens=512, pack_samples=False)
    args = SFTConfig(
        **common_options(tmp_path, {"remove_unused_columns": False}),
        per_device_train_batch_size=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        tiny_model("qwen3"),
        args,
        train_dataset=dataset,
        data_collator=TrieCollator(),
        processing_class=byte_tokenizer(),
    )
    install(trainer.model)
    stock.train()
    trainer.train()
    assert largest_error(parameters(trainer.model), parameters(stock.model)) < TOLERANCE


def test_resume_gives_the_same_losses(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "train_sampling_strategy": "random"}
    whole = trie_trainer(tiny_model("qwen3"), SAMPLES, tmp_path, **options)
    whole.train()
    resumed = trie_trainer(tiny_model("qwen3", seed=1), SAMPLES, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed, "loss")[-4:] == logged(whole, "loss")[-4:]
    assert largest_error(parameters(resumed.model), parameters(whole.model)) == 0


def test_a_model_that_another_trainer_has_wrapped_in_autocast_is_accepted(tmp_path):
    model = tiny_model("qwen3")
    trie_trainer(model, SAMPLES, tmp_path, max_steps=1, bf16=True).train()
    assert model(torch.tensor([[3, 4]])).logits.dtype == torch.float32  # as accelerate leaves it
    assert hasattr(model, "_original_forward")
    trie_trainer(model, SAMPLES, tmp_path, max_steps=1)
    assert not hasattr(model, "_original_forward")


def test_evaluation_equals_stock(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 5}
    stock, ours = _train_both(tmp_path, **options)
    assert logged(ours, "eval_loss") == pytest.approx(logged(stock, "eval_loss"), rel=TOLERANCE)
    assert logged(ours, "eval_mean_token_accuracy") == pytest.approx(logged(stock, "eval_mean_token_accuracy"))
    fresh = ours.evaluate(Dataset.from_dict({"units": SAMPLES[:4]}))
    assert fresh["eval_loss"] == pytest.approx(
        stock.evaluate(stock.train_dataset.select(range(12)))["eval_loss"], rel=1e-5
    )


def test_logs_show_sharing(tmp_path, capsys):
    ours = trie_trainer(tiny_model("qwen3"), SAMPLES, tmp_path, max_steps=20)
    ours.train()
    expanded = sum(len(context) + len(completion) for sample in SAMPLES for context, completion in sample)
    assert logged(ours, "num_tokens")[-1] == expanded
    ratios = logged(ours, "sharing_ratio")
    assert len(ratios) == 20
    assert all(ratio >= 1 for ratio in ratios)
    assert ours.dataset_statistics.expanded_tokens == expanded
    speeds = zip(logged(ours, "logical_tokens_per_second"), logged(ours, "computed_tokens_per_second"), strict=True)
    assert [logical / computed for logical, computed in speeds] == pytest.approx(ratios)
    report = capsys.readouterr().out
    assert "20 of 20 samples used, 60 sequences" in report
    assert f"sharing ratio {ours.dataset_statistics.sharing_ratio:.2f}" in report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "packing must be off in TrieSFTConfig, got True: pack_samples"),
        ({"padding_free": True}, "padding_free must be off"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be off in TrieSFTConfig, got 0.1"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop the columns"),
        ({"max_length": None}, "max_length must be an int .* got None; set max_length=16384"),
    ],
)
def test_options_that_break_tries_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrieSFTConfig(str(tmp_path), use_cpu=True, **options)


def test_context_parallelism_is_refused(tmp_path):
    from accelerate import ParallelismConfig

    with pytest.raises(ValueError, match=r"context and sequence parallelism cut a packed row.*set cp_size=1"):
        TrieSFTConfig(str(tmp_path), use_cpu=True, parallelism_config=ParallelismConfig(cp_size=2))


def test_trainer_arguments_are_checked(tmp_path):
    model, dataset = tiny_model("qwen3"), Dataset.from_dict({"units": SAMPLES})
    args = TrieSFTConfig(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="data_collator is not supported by TrieSFTTrainer"):
        TrieSFTTrainer(
            model, args, train_dataset=dataset, processing_class=byte_tokenizer(), data_collator=TrieCollator()
        )
    with pytest.raises(TypeError, match="args must be a TrieSFTConfig, got SFTConfig"):
        TrieSFTTrainer(model, SFTConfig(str(tmp_path), use_cpu=True), train_dataset=dataset)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0\.0 in the model's config, got 0.2"):
        TrieSFTTrainer(
            tiny_model("qwen3", attention_dropout=0.2), args, train_dataset=dataset, processing_class=byte_tokenizer()
        )


def test_a_padded_row_trains_the_same(tmp_path):
    plain = trie_trainer(tiny_model("qwen3"), SAMPLES, tmp_path, max_steps=5)
    padded = trie_trainer(tiny_model("qwen3"), SAMPLES, tmp_path, max_steps=5, pad_to_multiple_of=64)
    plain.train()
    padded.train()
    assert largest_error(parameters(padded.model), parameters(plain.model)) < TOLERANCE
    assert torch.isfinite(torch.tensor(logged(padded, "grad_norm"))).all()
