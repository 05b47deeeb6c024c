r"""The two models that real servers are tested with, made in the process; no network.

    python -m tests.engines.models DIR      # writes DIR/random and DIR/trained, for a server that you start yourself

Both have a head size of 32, the smallest that vLLM's CPU attention takes.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.models import tiny_model
from tests.support.rollouts import FORKED
from tests.support.sft import byte_tokenizer
from tw_recipes.pipelines.training import BATCH, train
from tw_recipes.rollout_command import load_tokenizer
from tw_recipes.tasks.model import tiny_model as task_model
from tw_recipes.tasks.products import SumOfProducts
from tw_recipes.tokens import add_tag_tokens

CONTEXT = 512
STEPS = 60  # enough for a fork in every trajectory; the arithmetic is still wrong


class Case(NamedTuple):
    """A model on disk, prompts for it, and a text in which it could fork."""

    folder: Path
    prompts: list[str]
    text: str


def random_case(folder: Path) -> Case:
    """A random byte-level model. Its matrices have more rows than there are tokens, as padded ones have."""
    options = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": CONTEXT}
    model = tiny_model("qwen3", vocab_size=288, **options)
    tokenizer = byte_tokenizer()
    add_tag_tokens(model, tokenizer)
    return _saved(model, tokenizer, Case(folder, [f"What is {n} and {n * n}?" for n in range(20)], FORKED))


def trained_case(folder: Path) -> Case:
    """The quickstart's model and task, two products instead of four, trained until it forks by itself."""
    task, threads = SumOfProducts(terms=2), torch.get_num_threads()
    tokenizer = task.tokenizer()
    model = task_model(tokenizer, heads=2)
    rows = task.rows(STEPS * BATCH, seed=0, style="forkjoin")
    torch.set_num_threads(2)
    try:
        train(model, tokenizer, rows, tries=True, folder=folder / "trainer", seed=0)
    finally:
        torch.set_num_threads(threads)
    test = task.rows(20, seed=1, style="forkjoin", split="test")
    return _saved(model, tokenizer, Case(folder, [row["prompt"] for row in test], test[0]["text"]))


def load_case(folder: Path) -> Case:
    """A case that `main` wrote."""
    return Case(folder, **json.loads((folder / "case.json").read_text()))


def _saved(model, tokenizer, case: Case) -> Case:
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(case.folder)
    tokenizer.save_pretrained(case.folder)
    (case.folder / "case.json").write_text(json.dumps({"prompts": case.prompts, "text": case.text}))
    return case


if __name__ == "__main__":
    for case in (random_case(Path(sys.argv[1]) / "random"), trained_case(Path(sys.argv[1]) / "trained")):
        print(case.folder, len(load_tokenizer(str(case.folder))), "tokens")
