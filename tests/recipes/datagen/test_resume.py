"""Kill -9 at random points and go on: the same final data set as a run that was left alone."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.support.annotator import RuleAnnotator
from tests.support.traces import trace_file
from tw_recipes.datagen.accounting import read_calls
from tw_recipes.datagen.generate import EndpointOptions, JobOptions, generate_data
from tw_recipes.datagen.mix import MixOptions

COUNT = 120


def uneven(request, answer):
    """Proposals that some records lose blocks on, so that all kinds of ends occur."""
    number = int(request.key)
    if number % 5 == 0:
        return {"blocks": []}
    if number % 7 == 0:
        answer["blocks"][0]["threads"][0]["last_line"] += 1
    return answer


def job(folder: str) -> JobOptions:
    endpoint, mix = EndpointOptions("rule", max_calls=6), MixOptions(0.3, "text", rows_per_file=50)
    source = str(Path(folder).parent / "traces.jsonl")
    return JobOptions(source, Path(folder), endpoint, mix=mix, grader="exact", concurrency=6, shard_size=20)


def work(folder: str) -> None:
    generate_data(job(folder), llm=RuleAnnotator({"blocks": uneven}, latency_s=0.002))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "dataset").iterdir()}


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_job_goes_on_to_the_same_data_set(tmp_path, seed):
    trace_file(tmp_path / "traces.jsonl", COUNT)
    work(str(tmp_path / "whole"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.recipes.datagen.test_resume"])
    random_, killed, folder = random.Random(seed), 0, tmp_path / "killed"
    calls = folder / "calls" / "worker-000.jsonl"
    for _ in range(4):
        size = calls.stat().st_size if calls.exists() else 0
        written = random_.randint(1, 20_000)
        process = context.Process(target=work, args=(str(folder),))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and not (calls.exists() and calls.stat().st_size >= size + written):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random_.uniform(0.0, 0.01))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
    assert killed >= 2
    if seed:  # a torn line on top, as a power cut would leave it
        path = next((folder / "stages" / "steps").iterdir())
        path.write_bytes(path.read_bytes()[:-25])
    work(str(folder))
    assert files(folder) == files(tmp_path / "whole")
    # Finished stages were not asked again: only what was in flight at a kill is asked twice.
    asked = sum(1 for _ in read_calls(folder / "calls" / "worker-000.jsonl"))
    whole = sum(1 for _ in read_calls(tmp_path / "whole" / "calls" / "worker-000.jsonl"))
    assert whole <= asked <= whole + 2 * 6 * (killed + 1)
