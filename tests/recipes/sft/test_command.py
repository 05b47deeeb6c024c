"""`threadweaver sft` end to end on a tiny model, and the example configurations."""

import json
import subprocess
import sys
from dataclasses import replace
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
from tw_recipes.sft.command import SFTScriptArguments, load_split, main, with_instruction
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
        (["--model_name_or_path", str(job / "bsae")], "model_name_or_path must be a local folder or a name on the Hub"),
        (["--dataset_name", "./dta"], "dataset_name must be a local folder or a name on the Hub, got './dta'"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint=True needs a checkpoint in output_dir"),
        (["--resume_from_checkpoint", "last"], "resume_from_checkpoint must be the folder of a checkpoint, or true"),
        (["--chat_template_path", str(job / "base")], "chat_template_path must be a .jinja or .j2 file"),
        (["--max_length", "0"], "max_tokens must be an int >= 1"),
        (["--packing", "true"], "packing must be off in TrieSFTConfig"),
    ):
        assert main(["--config", str(job / "job.yaml"), *flags]) == 1
        assert message in capsys.readouterr().err


def test_chats_without_a_template_are_refused_before_training(job, capsys):
    """Each row was called bad, and `drop_invalid` recommended."""
    tokenizer = byte_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(job / "base")
    (job / "base" / "chat_template.jinja").unlink(missing_ok=True)
    flags = ["--config", str(job / "job.yaml"), "--chat", "true"]
    assert main(flags) == 1
    said = capsys.readouterr().err
    assert "rows of messages need a tokenizer with a chat template, got one without; set chat_template_path" in said
    (job / "chat.jinja").write_text(template)
    assert main([*flags, "--chat_template_path", str(job / "chat.jinja")]) == 0
    assert AutoTokenizer.from_pretrained(job / "out").chat_template == template


@pytest.mark.parametrize("place", ["true", "True", "checkpoint-2"])
def test_training_goes_on_from_the_last_checkpoint_or_a_named_one(job, place):
    """`--resume_from_checkpoint true` looked for a folder of that name, once the model was loaded."""
    flags = ["--config", str(job / "job.yaml"), "--save_strategy", "steps", "--save_steps", "1"]
    assert main(flags) == 0
    before = (job / "out" / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    point = place if place.lower() == "true" else str(job / "out" / place)
    assert main([*flags, "--max_steps", "3", "--resume_from_checkpoint", point]) == 0
    assert (job / "out" / "checkpoint-3").is_dir()
    assert (job / "out" / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == before


def test_a_prompt_goes_through_the_chat_template_on_request(job):
    data = load_split(str(job / "data.jsonl"), "train")
    script = SFTScriptArguments(dataset_name="unused", chat=True, instruction=" Think.")
    chats = with_instruction(data, script)
    assert chats.column_names == ["messages"]
    asked, answered = chats[0]["messages"]
    assert asked == {"role": "user", "content": FORK_ROWS[0]["prompt"] + " Think."}
    assert answered == {"role": "assistant", "content": FORK_ROWS[0]["text"]}
    plain = with_instruction(data, replace(script, chat=False))
    assert plain[0] == FORK_ROWS[0] | {"prompt": FORK_ROWS[0]["prompt"] + " Think."}
    dialogue = Dataset.from_list([{"prompt": [asked], "text": "a"}])
    assert with_instruction(dialogue, script)[0]["messages"] == [asked, {"role": "assistant", "content": "a"}]
    assert with_instruction(data, SFTScriptArguments(dataset_name="unused")) is data
    with pytest.raises(ValueError, match=r"chat and instruction need the columns prompt and text, got \['messages'\]"):
        with_instruction(chats, script)
    holes = Dataset.from_list([{"prompt": "q", "text": "a"}, {"prompt": None, "text": "a"}])
    with pytest.raises(ValueError, match=r"unused, row 2: 'prompt' must be text or messages, got None; drop the row"):
        with_instruction(holes, script)


def test_the_command_trains_on_chats(job, capsys):
    assert main(["--config", str(job / "job.yaml"), "--chat", "true", "--instruction", " Think."]) == 0
    assert "6 of 6 samples used" in capsys.readouterr().out


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
