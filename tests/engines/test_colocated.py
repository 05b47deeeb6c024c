"""VLLMEngine: vLLM in its own virtual environment, decoding the same trajectories, with weights taken over between."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.forced import Bench
from tests.engines.models import CONTEXT
from tests.engines.process import end, engine_python, spawn, tail
from tw_recipes.decoding import Limits
from tw_recipes.rollout_command import load_tokenizer

ROOT = Path(__file__).parents[2]
MOST = 300


@pytest.fixture(scope="module")
def served(processes, tmp_path_factory):
    """What the job wrote, and the models of its three rounds."""
    case, _ = processes["trained"]
    folder = tmp_path_factory.mktemp("colocated")
    first = AutoModelForCausalLM.from_pretrained(case.folder, dtype="float32").eval()
    other = AutoModelForCausalLM.from_pretrained(case.folder, dtype="float32").eval()
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.roll(1, 0))
    other.save_pretrained(folder / "other")
    bench = Bench(case, None, first, load_tokenizer(str(case.folder)), Limits(max_total_tokens=MOST))
    prompts = bench.prompts[:8]
    names = {"folder": str(case.folder), "other": str(folder / "other")}
    (folder / "job.json").write_text(
        json.dumps({**names, "prompts": prompts, "max_context": CONTEXT, "max_total_tokens": MOST})
    )
    files = [str(folder / "job.json"), str(folder / "out.json")]
    command = [str(engine_python()), "-m", "tests.engines.colocated", *files]
    path = f"{ROOT / 'src'}:{ROOT}"
    process = spawn(command, folder / "log", PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    try:
        code = process.wait(400)
    finally:
        end(process)
    assert code == 0, tail(folder / "log")
    rounds = [bench, Bench(case, None, other, bench.tokenizer, bench.limits), bench]
    expected = [one.decode(one.local(), prompts) for one in rounds]
    exact = [[one.exact_logprobs(rollout.units) for rollout in own] for one, own in zip(rounds, expected, strict=True)]
    return json.loads((folder / "out.json").read_text()), expected, exact


def test_ids_equal_those_of_transformers_and_log_probs_the_exact_ones_whatever_the_weights(served):
    out, expected, exact = served
    for run, rollouts, values in zip(out["runs"], expected, exact, strict=True):
        assert run["ids"] == [one.ids.tolist() for one in rollouts]
        for there, here, wanted in zip(run["logprobs"], rollouts, values, strict=True):
            for own in (there, here.logprobs):
                np.testing.assert_allclose(np.concatenate(own), np.concatenate(wanted), rtol=0, atol=1e-5)
    assert out["runs"][0]["ids"] != out["runs"][1]["ids"]
    assert all(one.stats.num_threads >= 2 for one in expected[0])
    assert all(share > 0 for share in out["runs"][0]["cached_share"])


def test_tokens_are_told_and_cancelled_calls_leave_a_working_engine(served):
    out, (local, *_), _ = served
    assert out["told"] == out["called"] == local[0].generated_tokens
    assert out["streamed"] == out["after_cancel"] == local[0].ids.tolist()
    assert (out["eos_ids"], out["max_context"]) == ([1], CONTEXT)
