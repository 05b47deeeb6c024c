r"""`threadweaver grpo`: reinforcement learning on fork/join rollouts, or on sequential ones (`--forking false`).

    threadweaver grpo --config examples/grpo/quickstart_cpu.yaml
    accelerate launch --config_file examples/sft/fsdp2.yaml --num_processes 4 \
        -m tw_recipes.cli grpo --config examples/grpo/qwen3_8b_8gpus_vllm.yaml

Options are those of `PGRPOConfig`, TRL's `ModelConfig` and `GRPOScriptArguments`; a YAML file (`--config`) and flags
may be mixed, flags win. The model is one that has seen fork/join text (`threadweaver sft`).
Tests: tests/recipes/grpo/test_pgrpo_command.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, TrlParser
from trl.trainer.utils import get_peft_config

from tw_core.errors import ThreadWeaverError
from tw_recipes.evaluation.grading import ExactGrader, Grader, GraderPool
from tw_recipes.grpo.pgrpo_config import PGRPOConfig
from tw_recipes.grpo.pgrpo_trainer import PGRPOTrainer
from tw_recipes.model_files import load_with_tags, model_options, placement, resume_point, save_trained
from tw_recipes.sft.command import ask, load_split
from tw_recipes.tasks import get_task


@dataclass
class GRPOScriptArguments:
    """Data, grading and output of `threadweaver grpo`."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "JSONL or Parquet file, a saved data set's folder, or a Hub data set; or give `task`."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; default: none."})
    task: str | None = field(default=None, metadata={"help": "A synthetic task of tw_recipes.tasks instead of a file."})
    task_problems: int = field(default=10_000, metadata={"help": "Training problems of the task."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the problem: text, or messages."})
    chat: bool = field(default=False, metadata={"help": "Put a text prompt into the chat template, as the user's."})
    instruction: str = field(default="", metadata={"help": "Appended to each text prompt."})
    grader: str = field(
        default="math", metadata={"help": '"math": math-verify in processes; "exact": the boxed text; tasks bring own.'}
    )
    grader_workers: int = field(default=4, metadata={"help": "Processes that grade."})
    grader_timeout_s: float = field(default=5.0, metadata={"help": "Seconds for one answer."})
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "With LoRA, also save the merged model (the adapter goes to OUTPUT_DIR/adapter)."},
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.task is None):
            raise ValueError(
                f"exactly one of dataset_name and task must be given, got {self.dataset_name!r} and {self.task!r}"
            )
        if self.grader not in ("math", "exact"):
            raise ValueError(f'grader must be "math" or "exact", got {self.grader!r}')


def load_prompts(script: GRPOScriptArguments, split: str, seed: int) -> Dataset:
    """Rows with "prompt" and the other columns of one split.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The prompt column is missing, or empty in a row.
    """
    if script.task is not None:
        kind = "train" if split == script.dataset_train_split else "test"
        count = script.task_problems if kind == "train" else max(1, script.task_problems // 50)
        rows = get_task(script.task).rows(count, seed=seed, split=kind)
        return Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows])
    assert script.dataset_name is not None
    data = load_split(script.dataset_name, split, script.dataset_config)
    if script.prompt_column not in data.column_names:
        raise ValueError(
            f"{script.dataset_name} has no column {script.prompt_column!r}, its columns are {data.column_names}; set "
            "prompt_column"
        )
    # The prompt may change its type, so the old column goes first.
    others = data.remove_columns([name for name in data.column_names if name in ("prompt", script.prompt_column)])
    rows = data.select_columns([script.prompt_column])
    prompts = [ask(script, row, number, script.prompt_column) for number, row in enumerate(rows, 1)]
    return others.add_column("prompt", prompts) if others.column_names else Dataset.from_dict({"prompt": prompts})


def make_grader(script: GRPOScriptArguments) -> Grader:
    """The task's own grader, or the one that the flags name."""
    if script.task is not None:
        return get_task(script.task).grader()
    if script.grader == "exact":
        return ExactGrader()
    return GraderPool(script.grader_workers, script.grader_timeout_s)


def run_grpo(script: GRPOScriptArguments, args: PGRPOConfig, model_args: ModelConfig) -> PGRPOTrainer:
    """Train and save; what `threadweaver grpo` does.

    Returns:
        The trainer after training. `args.output_dir` holds the model, the tokenizer and rollouts/.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing; name a model that `threadweaver sft` or `quickstart` wrote")
    checkpoint = resume_point(args)
    train = load_prompts(script, script.dataset_train_split, args.seed)
    test = script.dataset_test_split
    options = model_options(model_args, args.trust_remote_code)
    model, tokenizer = load_with_tags(name, options | placement(model_args))
    grader = make_grader(script)
    try:
        trainer = PGRPOTrainer(
            model,
            args,
            train,
            eval_dataset=None if test is None else load_prompts(script, test, args.seed),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            grader=grader,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        grader.close()
    save_trained(trainer, name, options, merge_adapter=script.merge_adapter)
    return trainer


def main(argv: Sequence[str]) -> int:
    """Parse flags and YAML, train, and return the exit status."""
    parser = TrlParser((GRPOScriptArguments, PGRPOConfig, ModelConfig), prog="threadweaver grpo")
    try:
        script, args, model_args = parser.parse_args_and_config(list(argv))
        run_grpo(script, args, model_args)
    except (ThreadWeaverError, OSError, ValueError, KeyError) as error:
        print(f"threadweaver grpo: {error}", file=sys.stderr)
        return 1
    return 0
