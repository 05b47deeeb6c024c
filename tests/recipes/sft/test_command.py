"""`threadweaver sft` end to end on a tiny model, and the example configurations."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from tests.support.models import tiny_model
from tests.support.sft import byte_tokenizer, trajectories, trie_trainer
from tests.support.text import FORK_ROWS
from tw_recipes.cli import main as threadweaver
from tw_recipes.model_files import save_trained
from tw_recipes.sft.command import SFTScriptArguments, load_split, main
from tw_recipes.sft.config import TrieSFTConfig
from tw_recipes.tokens import require_tag_tokens

EXAMPLES = Path(__file__).parents[3] / "examples" / "sft"


@pytest.fixture
def job(tmp_path):
    """A base model without tags, a JSONL file, and a YAML file that ties them together."""
    tiny_model("qwen3", vocab_size=260).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with (tmp_path / "data.jsonl").open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in FORK_ROWS)
    config = {
        "model_name_or_path": str(tmp_path / "base"),
        "dataset_name": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "max_length": 1024,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 0.01,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_full_fine_tuning_from_yaml_and_flags(job, capsys):
    assert threadweaver(["sft", "--config", str(job / "job.yaml"), "--max_steps", "3"]) == 0
    assert "6 of 6 samples used" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(job / "out")
    tokenizer = AutoTokenizer.from_pretrained(job / "out")
    require_tag_tokens(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 270
    base = AutoModelForCausalLM.from_pretrained(job / "base")
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert "trie" not in (job / "out" / "config.json").read_text()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_lora_saves_adapter_and_merged_model(job):
    flags = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "2", "--lora_dropout", "0"]
    assert main(["--config", str(job / "job.yaml"), *flags]) == 0
    assert (job / "out" / "adapter" / "adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(job / "out")
    base = AutoModelForCausalLM.from_pretrained(job / "base")
    left, right = merged.model.layers[0].self_attn, base.model.layers[0].self_attn
    assert not torch.equal(left.q_proj.weight, right.q_proj.weight)
    assert torch.equal(left.k_proj.weight, right.k_proj.weight)
    assert merged.get_input_embeddings().weight.shape[0] == len(AutoTokenizer.from_pretrained(job / "out"))


def test_under_fsdp_a_whole_model_is_saved_whatever_the_form_of_checkpoints(tmp_path, monkeypatch):
    """examples/sft/fsdp2.yaml asks for sharded checkpoints, in which form transformers saved no model and said nothing.

    accelerate runs FSDP on GPUs alone, so gathering the shards is replaced; what is saved when is transformers' own.
    """
    trainer = trie_trainer(tiny_model("qwen3"), trajectories(2, 3), tmp_path / "out")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the constructor changes
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator, "state", SimpleNamespace(fsdp_plugin=plugin))
        patch.setattr(trainer, "is_fsdp_enabled", True)
        patch.setattr(trainer.accelerator, "get_state_dict", lambda model: model.state_dict())
        save_trained(trainer, "unused", {})
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)


def test_parquet_folders_and_missing_files(tmp_path):
    rows = Dataset.from_list(FORK_ROWS)
    rows.to_parquet(tmp_path / "data.parquet")
    rows.save_to_disk(tmp_path / "saved")
    assert load_split(str(tmp_path / "data.parquet"), "train").to_list() == FORK_ROWS
    assert load_split(str(tmp_path / "saved"), "train").to_list() == FORK_ROWS
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl' does not exist"):
        load_split("nowhere.jsonl", "train")
    with pytest.raises(ValueError, match=r"single file, whose only split is 'train', got 'validation'"):
        load_split(str(tmp_path / "data.parquet"), "validation")


def test_errors_end_with_status_one(job, capsys):
    (job / "data.jsonl").write_text('{"question": "a"}\n')
    assert main(["--config", str(job / "job.yaml")]) == 1
    assert "expected columns" in capsys.readouterr().err
    (job / "broken.jsonl").write_text('{"prompt": "a", "text": "b"}\n{"prompt": \n')
    (job / "none.jsonl").write_text("")
    for flags, message in (
        (["--dataset_name", "nowhere.jsonl"], "does not exist"),
        (["--dataset_name", str(job / "broken.jsonl")], "broken.jsonl, line 2: expected one JSON object"),
        (["--dataset_name", str(job / "none.jsonl")], "cannot be read: it has no row; repair it"),
        (["--max_length", "0"], "max_tokens must be an int >= 1"),
        (["--packing", "true"], "packing must be off in TrieSFTConfig"),
    ):
        assert main(["--config", str(job / "job.yaml"), *flags]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen3_8b_8gpus.yaml", "qwen3_8b_lora_1gpu.yaml"])
def test_example_configurations_parse(name, tmp_path):
    parser = TrlParser((SFTScriptArguments, TrieSFTConfig, ModelConfig))
    flags = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    script, args, model_args = parser.parse_args_and_config(["--config", str(EXAMPLES / name), *flags])
    assert model_args.model_name_or_path == "Qwen/Qwen3-8B"
    assert args.max_length > 32000
    assert args.warmup_steps == 0.05
    assert script.dataset_name == "trajectories.jsonl"
    assert model_args.use_peft == ("lora" in name)


@pytest.mark.parametrize(("name", "kind"), [("fsdp2.yaml", "FSDP"), ("zero3.yaml", "DEEPSPEED")])
def test_accelerate_configurations_parse(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / name))
    assert config.distributed_type == kind
    assert config.num_processes == 8


def test_import_is_cheap():
    code = (
        "import sys, tw_recipes, tw_recipes.sft\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert tw_recipes.__all__ == sorted(tw_recipes.__all__)\n"
        "try:\n    tw_recipes.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
