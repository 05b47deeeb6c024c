"""benchmarks/bench_decoding.py: the forced model writes the plan through both in-process engines; the file says what
was measured.
"""

import json

import pytest
from benchmarks.bench_decoding import main
from benchmarks.forced_model import EOS, TAG_IDS, Plan, force

from tests.support.models import tiny_model
from tw_recipes.decoding import GREEDY, ForkJoinDecoder, Limits, TransformersEngine
from tw_recipes.decoding.lockstep_engine import LockstepEngine

PLAN = Plan(prompt_tokens=10, before=3, threads=3, words=5, after=2)


@pytest.mark.parametrize("engine", [TransformersEngine, LockstepEngine])
def test_sequential_and_fork_join_write_the_same_number_of_tokens(engine):
    model = tiny_model("qwen3", eos_token_id=EOS)
    for fork in (True, False):
        handle = force(model, PLAN, fork=fork)
        decoder = ForkJoinDecoder(engine(model, eos_ids=[EOS]), TAG_IDS, Limits(max_depth=int(fork)), GREEDY)
        rollouts = decoder.decode_all([[50 + place] * PLAN.prompt_tokens for place in range(3)])
        handle.remove()
        for rollout in rollouts:
            assert rollout.complete
            assert rollout.generated_tokens == PLAN.generated
            written = [unit.completion.tolist() for unit in rollout.units]
            if fork:
                assert written == [PLAN.opening(), *[PLAN.thread()] * 3, PLAN.closing()]
            else:
                assert len(written) == 1
    rollout = ForkJoinDecoder(engine(model, eos_ids=[EOS]), TAG_IDS, Limits(max_total_tokens=9), GREEDY).decode_all(
        [[50]]
    )
    assert rollout[0].response_ids.tolist() != PLAN.opening()[:9], "the hook is still there"


def test_the_forced_benchmark_says_what_it_measured(tmp_path):
    path = tmp_path / "decoding.json"
    words = ["forced", "--tiny", "--device", "cpu", "--engines", "lockstep", "--out", str(path)]
    assert main([*words, "--batches", "1", "--rounds", "3", "--seconds", "0"]) == 0
    assert main([*words, "--batches", "2", "4", "--rounds", "1", "--merge", str(path)]) == 0
    found = json.loads(path.read_text())
    meta, values = found["meta"], {(r["case"], r["metric"]): r["value"] for r in found["records"]}
    assert meta["measured"] == ["batch_2 lockstep", "batch_4 lockstep"]
    assert meta["left_out"] == []
    assert meta["earlier"][0]["measured"] == ["batch_1 lockstep"]
    assert "tmp" not in meta["command"], "a path of this machine"
    for batch in (1, 2, 4):
        assert values[f"batch_{batch}", "rounds"] == 1, "the time for the rounds was over"
        assert values[f"batch_{batch}", "trajectories"] == batch
        assert 1.5 < values[f"batch_{batch}", "speedup_tokens"] < 4
        assert values[f"batch_{batch}", "speedup_wall"] > 0
