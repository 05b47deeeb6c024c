"""The forced model of benchmarks/bench_decoding.py: what it writes is the plan, through both in-process engines."""

import pytest
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
