"""`threadweaver grpo` end to end on a tiny model, and the example configurations."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from tests.support.pgrpo import ROWS, taught_policy, tokenizer
from tw_recipes.cli import main as threadweaver
from tw_recipes.grpo.command import GRPOScriptArguments, load_prompts, main
from tw_recipes.grpo.pgrpo_config import PGRPOConfig
from tw_recipes.rollout import read_trajectories
from tw_recipes.tasks import get_task
from tw_recipes.tasks.model import tiny_model

EXAMPLES = Path(__file__).parents[3] / "examples" / "grpo"
QUICK = ["--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"]


def test_the_cpu_example_runs(tmp_path):
    """The example's own file; the model is a random one instead of the quickstart's."""
    task = get_task("products")
    tiny_model(task.tokenizer(), layers=1).save_pretrained(tmp_path / "model")
    task.tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *QUICK]
    flags += ["--task_problems", "16", "--max_completion_length", "60", "--per_device_train_batch_size", "16"]
    assert threadweaver(["grpo", "--config", str(EXAMPLES / "quickstart_cpu.yaml"), *flags]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(task.tokenizer())
    written = [len(list(read_trajectories(file))) for file in sorted((tmp_path / "out" / "rollouts").iterdir())]
    assert written == [8, 8]


@pytest.fixture
def job(tmp_path):
    """A model that forks, a file of problems, and a YAML file that ties them together."""
    taught_policy().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with (tmp_path / "problems.jsonl").open("w") as lines:
        lines.writelines(json.dumps({"question": row["prompt"], "answer": row["answer"]}) + "\n" for row in ROWS)
    config = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "problems.jsonl"),
        "prompt_column": "question",
        "grader": "exact",
        "output_dir": str(tmp_path / "out"),
        "max_completion_length": 200,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "learning_rate": 0.001,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_lora_saves_adapter_and_merged_model(job, capsys):
    flags = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "2", "--lora_dropout", "0"]
    assert main(["--config", str(job / "job.yaml"), *QUICK, *flags]) == 0
    assert (job / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(job / "out").config.vocab_size == 288
    assert "'rollout/activation_ratio': '0'" not in capsys.readouterr().out


def test_errors_end_with_status_one(job, capsys):
    config = str(job / "job.yaml")
    for flags, message in (
        (["--prompt_column", "problem"], "has no column 'problem', its columns are ['question', 'answer']"),
        (["--dataset_name", "nowhere.jsonl"], "does not exist"),
        (["--task", "products"], "exactly one of dataset_name and task"),
        (["--answer_column", "solution"], "must have the columns 'prompt' and 'solution'"),
        (["--grader", "llm"], 'grader must be "math" or "exact"'),
    ):
        assert main(["--config", config, *QUICK, *flags]) == 1
        assert message in capsys.readouterr().err


def test_chats_without_a_template_are_refused_before_training(job, capsys):
    """It showed at the first step."""
    plain = AutoTokenizer.from_pretrained(job / "model")
    plain.chat_template = None
    plain.save_pretrained(job / "model")
    (job / "model" / "chat_template.jinja").unlink(missing_ok=True)
    flags = ["--config", str(job / "job.yaml"), *QUICK]
    assert main([*flags, "--chat", "true"]) == 1
    said = capsys.readouterr().err
    assert "prompts of messages need a tokenizer with a chat template, got one without; set the tokenizer" in said
    assert not list((job / "out").glob("rollouts"))


def test_training_goes_on_from_the_last_checkpoint(job):
    flags = ["--config", str(job / "job.yaml"), "--disable_tqdm", "true", "--save_steps", "1"]
    assert main([*flags, "--max_steps", "1"]) == 0
    first = (job / "out" / "rollouts" / "step-000000.jsonl").stat().st_mtime_ns
    assert main([*flags, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    assert (job / "out" / "checkpoint-2").is_dir()
    assert (job / "out" / "rollouts" / "step-000000.jsonl").stat().st_mtime_ns == first


def test_prompts_become_chats_with_the_instruction(job):
    script = GRPOScriptArguments(
        dataset_name=str(job / "problems.jsonl"), prompt_column="question", chat=True, instruction=" Think."
    )
    rows = load_prompts(script, "train", 0)
    assert rows.column_names == ["answer", "prompt"]
    assert rows[0]["prompt"] == [{"role": "user", "content": ROWS[0]["prompt"] + " Think."}]
    (job / "holes.jsonl").write_text('{"prompt": "q"}\n{"prompt": null}\n')
    with pytest.raises(ValueError, match=r"holes.jsonl, row 2: 'prompt' must be text or messages, got None; drop"):
        load_prompts(GRPOScriptArguments(dataset_name=str(job / "holes.jsonl")), "train", 0)
    messages = [{"prompt": rows[0]["prompt"], "answer": "7"}]
    (job / "chat.jsonl").write_text(json.dumps(messages[0]) + "\n")
    assert load_prompts(GRPOScriptArguments(dataset_name=str(job / "chat.jsonl")), "train", 0).to_list() == messages


@pytest.mark.parametrize("name", sorted(file.name for file in EXAMPLES.glob("*.yaml")))
def test_example_configurations_parse(name, tmp_path):
    parser = TrlParser((GRPOScriptArguments, PGRPOConfig, ModelConfig))
    flags = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    script, args, model_args = parser.parse_args_and_config(["--config", str(EXAMPLES / name), *flags])
    assert (args.num_generations, args.scale_rewards, args.staleness, args.forking) == (8, "none", 0, True)
    assert model_args.use_peft == ("lora" in name)
    assert args.use_vllm == ("vllm" in name)
    assert (script.task == "products") == ("cpu" in name)
    if "8gpus" in name:
        rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * 4
        assert (rollouts, args.learning_rate, args.max_grad_norm) == (128 * 8, 1e-6, 1.0)
        assert (args.incorrect_reward, args.acceleration_rho, args.acceleration_max) == (-1.0, 0.5, 0.2)
