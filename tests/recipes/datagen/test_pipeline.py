"""The pipeline: failures stay with their record, a budget stops it, memory follows what is in flight."""

import asyncio
import json
from collections import Counter

import pytest

from tests.support.annotator import RuleAnnotator
from tests.support.traces import traces
from tw_recipes.datagen.accounting import Accounts
from tw_recipes.datagen.annotator import Annotator, RetryPolicy
from tw_recipes.datagen.limits import Budget
from tw_recipes.datagen.llm import AccessError, EndpointError, Models, TransientError
from tw_recipes.datagen.pipeline import run_pipeline
from tw_recipes.datagen.reasons import Reason
from tw_recipes.datagen.store import STAGES, Store, StoreError
from tw_recipes.evaluation.grading import ExactGrader

MODELS = Models("rule")


def annotator(llm, **options):
    return Annotator(llm, MODELS, retry=RetryPolicy(2, 0.001, 0.002), **options)


class Broken(RuleAnnotator):
    """Raises for some records."""

    def __init__(self, errors):
        super().__init__()
        self.errors = errors

    async def complete(self, request):
        error = self.errors.get((request.key, request.question))
        if error is not None:
            raise error
        return await super().complete(request)


async def run(llm, store, count=8, **options):
    more = {name: options.pop(name) for name in ("budget", "accounts") if name in options}
    return await run_pipeline(traces(count), annotator(llm, **more), ExactGrader(), store, **options)


async def test_a_failure_stays_with_its_record_and_the_next_run_tries_only_that_again(tmp_path):
    store = Store(tmp_path, {}, shard_size=3)
    errors = {
        ("t1", "steps"): EndpointError("no"),
        ("t4", "outlines"): TransientError("away"),
        ("t5", "check"): ZeroDivisionError("oops"),
    }
    summary = await run(Broken(errors), store)
    assert summary.kinds == {"forkjoin": 5, "failed": 3}
    found = {line["id"]: line["dropped"][0] for line in store.failures()}
    assert {name: dropped["reason"] for name, dropped in found.items()} == {
        "t1": Reason.ENDPOINT,
        "t4": Reason.ENDPOINT,
        "t5": Reason.INTERNAL,
    }
    assert "no reply after 2 attempts: away" in found["t4"]["detail"]
    assert found["t5"]["detail"] == "ZeroDivisionError: oops"
    assert [store.finished(shard) for shard in range(3)] == [False, False, True]

    llm = RuleAnnotator()
    again = await run(llm, store)
    assert (again.kinds, again.skipped) == ({"forkjoin": 3}, 5)
    # t1 from its first question on, t4 its last one, t5 all but the steps.
    expected = Counter(["steps", "blocks", "check", "rewrite", "outlines"])
    expected += Counter(["outlines"]) + Counter(["blocks", "check", "rewrite", "outlines"])
    assert Counter(llm.asked) == expected
    assert list(store.failures()) == []
    assert [line["place"] for line in store.samples()] == list(range(8))
    assert all(store.finished(shard) for shard in range(3))
    third = await run(llm, store)
    assert (third.kinds, third.skipped) == ({}, 8)


async def test_an_endpoint_that_refuses_everybody_ends_the_run(tmp_path):
    llm = Broken({("t3", "steps"): AccessError("wrong key")})
    with pytest.raises(AccessError, match="wrong key"):
        await run(llm, Store(tmp_path, {}), count=200, concurrency=2)
    assert llm.asked.count("steps") < 20


async def test_a_budget_stops_cleanly_and_a_larger_one_goes_on(tmp_path):
    path = tmp_path / "calls.jsonl"
    free = Accounts(None, MODELS)
    whole = Store(tmp_path / "whole", {})
    await run(RuleAnnotator(), whole, count=20, accounts=free)
    budget = Budget(max_tokens=free.total.tokens // 2 + 9_000)
    store = Store(tmp_path / "part", {}, shard_size=5)
    accounts = Accounts(path, MODELS)
    summary = await run(RuleAnnotator(), store, count=20, budget=budget, accounts=accounts, concurrency=3)
    assert "the budget is used up" in summary.stopped
    assert 0 < sum(summary.kinds.values()) < 20
    assert summary.failed == 0
    assert accounts.total.tokens == budget.tokens <= budget.max_tokens
    again = await run(RuleAnnotator(), store, count=20, accounts=Accounts(path, MODELS), concurrency=3)
    assert (again.stopped, sum(again.kinds.values()) + again.skipped) == ("", 20)
    assert list(store.samples()) == list(whole.samples())
    # What was asked before the stop was not asked again.
    accounts = Accounts(path, MODELS)
    accounts.close()
    assert accounts.total.tokens == free.total.tokens


async def test_workers_share_the_shards(tmp_path):
    whole = Store(tmp_path / "whole", {}, shard_size=2)
    await run(RuleAnnotator(), whole, count=9)
    store = Store(tmp_path / "shared", {}, shard_size=2)
    counts = []
    for worker in (1, 0, 2):
        summary = await run(RuleAnnotator(), store, count=9, worker=worker, workers=3)
        counts.append(sum(summary.kinds.values()))
    assert counts == [3, 4, 2]
    assert list(store.samples()) == list(whole.samples())
    for stage in STAGES:
        names = [path.name for path in (tmp_path / "shared" / "stages" / stage).iterdir()]
        assert sorted(names) == [f"shard-{number:05d}.jsonl" for number in range(5)]


async def test_records_are_read_as_fast_as_they_finish(tmp_path):
    ahead = []
    done = 0

    def source():
        for trace in traces(60):
            ahead.append(trace.place - done)
            yield trace

    def count(summary):
        nonlocal done
        done = sum(summary.kinds.values())

    store = Store(tmp_path, {}, shard_size=7)
    slow = annotator(RuleAnnotator(latency_s=0.0005))
    await run_pipeline(source(), slow, ExactGrader(), store, concurrency=4, on_progress=count)
    assert done == 60
    assert max(ahead) <= 5


async def test_wrong_numbers_are_refused(tmp_path):
    store = Store(tmp_path, {})
    for options in ({"concurrency": 0}, {"worker": 2, "workers": 2}):
        with pytest.raises(ValueError, match="concurrency must be >= 1 and 0 <= worker < workers"):
            await run(RuleAnnotator(), store, **options)
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        Store(tmp_path, {}, shard_size=0)


def test_a_folder_of_another_job_and_a_broken_file_are_refused(tmp_path):
    store = Store(tmp_path, {"model": "a"})
    with pytest.raises(StoreError, match="was made with model='a', got 'b'; give the same settings to go on"):
        Store(tmp_path, {"model": "b"})
    path = store.path("filter", 0)
    path.write_text('{"place": 0, "data": {}}\n{"no": 1}\n{"place": 1, "data": {}}\n')
    with pytest.raises(StoreError, match="line 2: expected a record"):
        list(store.samples())


async def test_a_half_written_line_is_cut_off_and_done_again(tmp_path):
    store = Store(tmp_path, {})
    await run(RuleAnnotator(), store)
    before = list(store.samples())
    for stage in STAGES:
        path = store.path(stage, 0)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 40])
    store.path("done", 0).unlink()
    assert len(list(store.samples())) == 7
    summary = await run(RuleAnnotator(), store)
    assert (summary.kinds, summary.skipped) == ({"forkjoin": 1}, 7)
    assert list(store.samples()) == before
    assert all(json.loads(line) for line in store.path("filter", 0).read_text().splitlines())


async def test_cancelling_leaves_no_task_behind(tmp_path):
    job = asyncio.create_task(run(RuleAnnotator(latency_s=30), Store(tmp_path, {}), concurrency=3))
    await asyncio.sleep(0.05)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert asyncio.all_tasks() == {asyncio.current_task()}
