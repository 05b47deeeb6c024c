"""`run_blocking`, and that what uses it works inside a running event loop, as in a notebook."""

import asyncio

import pytest

from tests.support.rollouts import tagged_tokenizer, text_engine
from tw_core import TagIds
from tw_recipes.blocking import run_blocking
from tw_recipes.decoding import ForkJoinDecoder
from tw_recipes.evaluation.benchmarks import Problem
from tw_recipes.evaluation.evaluate import PromptFormat, evaluate
from tw_recipes.evaluation.grading import ExactGrader
from tw_recipes.rollout import Prompt, rollout


async def double(value: int) -> int:
    await asyncio.sleep(0)
    if value < 0:
        raise ValueError("negative")
    return 2 * value


def both() -> int:
    with pytest.raises(ValueError, match="negative"):
        run_blocking(double(-1))
    return run_blocking(double(2))


def test_without_a_loop():
    assert both() == 4


async def test_inside_a_loop():
    assert both() == 4


async def test_rollout_and_evaluate_work_in_a_notebook(tmp_path):
    """They ended with "asyncio.run() cannot be called from a running event loop"."""
    tokenizer = tagged_tokenizer()
    decoder = ForkJoinDecoder(text_engine(tokenizer), TagIds.from_tokenizer(tokenizer))
    assert rollout([Prompt("a", [65])], decoder, tokenizer, tmp_path / "out.jsonl").written == 1
    problems, prompt = [Problem("a", "Q", "7")], PromptFormat(raw=True)
    assert evaluate(problems, decoder, tokenizer, tmp_path, grader=ExactGrader(), prompt=prompt).accuracy.value == 1.0
