"""DeepSpeed ZeRO-3 on two processes: `threadweaver sft` gives the losses and the saved model of one process.

Runs where DeepSpeed is installed (`pip install deepspeed`; make test-slow); on a CPU it compiles an operation first.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.models import tiny_model
from tests.support.sft import byte_tokenizer, parameters
from tests.support.text import FORK_ROWS
from tests.support.tries import largest_error

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
OPTIONS = {
    "max_steps": 10,
    "max_length": 1024,
    "pack_samples": "false",
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "disable_tqdm": "true",
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
}


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def _base(folder, **options):
    """A model without tags, data, and DeepSpeed's configuration; returns the model."""
    base = tiny_model("qwen3", vocab_size=260, **options)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORK_ROWS))
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    return base


def _sft(folder, out, *launcher, **options):
    flags = {"model_name_or_path": "base", "dataset_name": "data.jsonl", "output_dir": out, **OPTIONS, **options}
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    command = [sys.executable, *launcher, "-m", "tw_recipes.cli", "sft", *words]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    logged = re.findall(r"'loss': '([0-9.]+)', 'grad_norm': '([0-9.]+)'", done.stdout)
    return logged, parameters(AutoModelForCausalLM.from_pretrained(folder / out))


@pytest.mark.parametrize("tied", [True, False])
def test_two_partitioned_processes_equal_one(tied, tmp_path):
    base = _base(tmp_path, tie_word_embeddings=tied)
    logged, expected = _sft(tmp_path, "one", gradient_accumulation_steps=2)
    found_logged, found = _sft(tmp_path, "two", *TWO, deepspeed="zero3.json")
    assert len(logged) == 10
    assert found_logged == logged
    assert largest_error(found, expected) < 1e-5
    assert expected["model.embed_tokens.weight"].shape[0] == 270  # grown by the tags, whose rows are means
    assert ("lm_head.weight" in expected) != tied
    mlp = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(expected[mlp], dict(base.named_parameters())[mlp])


def test_an_adapter_is_merged_into_a_whole_model(tmp_path):
    """Rank 0 merges alone; its fresh copy was partitioned too, which ended it in a call that awaited the others."""
    lora = {"use_peft": "true", "lora_target_modules": "q_proj v_proj", "lora_r": 2, "lora_dropout": 0}
    lora["train_tag_tokens"] = "false"  # peft asks CUDA for a device there
    _base(tmp_path)
    logged, expected = _sft(tmp_path, "one", gradient_accumulation_steps=2, **lora)
    found_logged, found = _sft(tmp_path, "two", *TWO, deepspeed="zero3.json", **lora)
    assert len(logged) == 10
    assert found_logged == logged
    assert largest_error(found, expected) < 1e-5
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").exists()
