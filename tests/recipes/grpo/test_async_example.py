"""examples/grpo/async_tree_attention.py: TRL's async tree path through our kernel equals its samples one by one."""

import importlib.util
import queue
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AttentionInterface

from tests.support.grpo import saved_model, tokenizer, train
from tests.support.models import tiny_model
from tests.support.sft import BYTE_VOCAB
from tests.support.tries import gradients, largest_error
from tw_core import PackedTrie, ReasoningTrie

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns that the module is experimental
    from trl.experimental.async_grpo import AsyncGRPOConfig, async_grpo_trainer
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
    from trl.experimental.async_grpo.packing import TreeRow

EXAMPLE = Path(__file__).parents[3] / "examples" / "grpo" / "async_tree_attention.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("async_tree_attention", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {name: AttentionInterface._global_mapping.get(name) for name in (module.TREE_ATTENTION,)}
    yield module
    for name, function in before.items():
        if function is None:
            AttentionInterface._global_mapping.pop(name, None)
        else:
            AttentionInterface.register(name, function)


def _samples(count=8, prompts=2):
    """Rollouts that share a prompt and, two by two, the beginning of their completions."""
    draw = np.random.default_rng(0)
    starts = [draw.integers(3, 90, 9 + 4 * i) for i in range(prompts)]
    samples = []
    for i in range(count):
        prompt = starts[i % prompts]
        common = np.arange(20, 24) + i // 4
        completion = np.concatenate([common, draw.integers(3, 90, draw.integers(2, 7))])
        ids = np.concatenate([prompt, completion])
        samples.append(
            RolloutSample(
                prompt=[],
                completion=[],
                input_ids=ids,
                completion_mask=np.arange(len(ids)) >= len(prompt),
                old_log_probs=-5.5 + 0.5 * draw.standard_normal(len(ids)).astype(np.float32),
                advantage=float(draw.standard_normal()),
                model_version=0,
                group_id=i % prompts,
                metrics={"reward": 0.0},
            )
        )
    return samples


def test_rows_are_those_of_the_trie(example):
    row = TreeRow()
    for sample in _samples():
        row.add(asdict(sample))
    packed = row.pack()
    end, depth = example.tree_rows(
        packed["tree_cu_seqlens_q"], packed["tree_cu_seqlens_k"], packed["input_ids"].numel()
    )
    assert torch.equal(depth.long(), packed["position_ids"])
    # TRL forks a token early, so a token may stand twice; parents say who sees whom all the same.
    mask = end[None, :] > torch.arange(len(end))[:, None]
    mask &= torch.arange(len(end))[None, :] <= torch.arange(len(end))[:, None]
    assert torch.equal(mask.sum(1), depth.long() + 1)
    trie = ReasoningTrie.from_sequences([sample.input_ids for sample in _samples()]).pack()
    assert isinstance(trie, PackedTrie)
    assert trie.num_rows < len(end) < trie.num_expanded_tokens


class _Worker:
    """Gives the trainer samples that are already there."""

    def __init__(self, samples):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        for sample in samples:
            self.rollout_buffer.put(sample)

    def start(self):
        pass

    def stop(self):
        pass

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        pass


class _NoTransfer:
    def init_weight_transfer(self):
        pass

    def pause(self):
        pass

    def send_weights(self, iterator):
        pass

    def resume(self):
        pass

    def destroy(self):
        pass


def _reference(model, samples, epsilon):
    """TRL's loss, written out on the samples one by one."""
    total, count = torch.zeros(()), 0
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)[None]
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        mask = torch.from_numpy(sample.completion_mask[1:])
        ratio = (logps.gather(1, ids[0, 1:, None])[:, 0] - torch.from_numpy(sample.old_log_probs[1:])).exp()[mask]
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        total = total - torch.min(ratio * sample.advantage, clipped * sample.advantage).sum()
        count += len(ratio)
    return total / count


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_step_of_the_async_trainer_equals_the_samples_one_by_one(example, family, tmp_path, monkeypatch):
    samples = _samples()
    # TRL asks the GPU for its name, to report utilisation.
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    trainer = example.TrieAsyncGRPOTrainer(
        model=saved_model(family),
        args=AsyncGRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=len(samples),
            gradient_accumulation_steps=1,
            token_budget=-1,
            epsilon=0.3,
            optim="sgd",
            learning_rate=1e-3,
            max_grad_norm=1e6,
            dtype="float32",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tokenizer(),
        rollout_worker=_Worker(samples * 3),  # the loader reads ahead
        weight_transfer=_NoTransfer(),
    )
    (found,), metrics = train(trainer)
    model = tiny_model(family, vocab_size=BYTE_VOCAB)
    loss = _reference(model, samples, epsilon=0.3)
    assert metrics[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert largest_error(found, gradients(model, loss)) < 1e-5
    assert 0 < metrics[0]["clip_ratio/region_mean"] < 1
