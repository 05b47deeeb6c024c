"""P-GRPO on a GPU: what samples and what trains agree, before and after an update, in each of its two engines."""

import pytest

from tests.support.grpo import train
from tests.support.pgrpo import TEXTS, pgrpo_trainer, taught_policy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["lockstep", "transformers"])
def test_the_sampler_follows_the_weights_and_the_rollouts_fork(tmp_path, engine, bf16):
    """The second batch is decoded with weights that the first one moved; with stale ones the mean was 0.015."""
    model = taught_policy(*TEXTS[:3])  # every prompt: now right, now wrong, with blocks and without
    trainer = pgrpo_trainer(
        tmp_path,
        model=model,
        engine="model",
        rollout_engine=engine,
        max_steps=2,
        learning_rate=0.3,
        per_device_train_batch_size=32,
        num_generations=8,
        use_cpu=False,
        bf16=bf16,
    )
    assert trainer.accelerator.device.type == "cuda"
    gradients, logged = train(trainer)
    for gradient, metrics in zip(gradients, logged, strict=True):
        assert all(tensor.isfinite().all() for tensor in gradient.values())
        assert metrics["sampling/trie_logp_difference/mean"] < (5e-3 if bf16 else 1e-5)
        assert metrics["sampling/trie_logp_difference/max"] < (0.5 if bf16 else 1e-3)
        assert metrics["rollout/error"] == metrics["rollout/cancelled"] == 0
        assert metrics["sharing_ratio"] > 1.5
    assert logged[0]["grad_norm"] > 0
    assert logged[0]["rollout/activation_ratio"] > 0.3
