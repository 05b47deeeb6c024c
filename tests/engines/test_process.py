"""A server that is ours: killed in the middle of a run and started again, and the command line on top of it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tests.engines.forced import Bench
from tw_recipes.cli import main as threadweaver
from tw_recipes.decoding import Limits
from tw_recipes.rollout import read_trajectories
from tw_recipes.rollout_command import load_tokenizer


def flags(case, server, folder):
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in case.prompts))
    engine = ["--model", str(case.folder), "--base-url", server.url, "--served-name", server.model]
    return [str(prompts), "--raw", *engine, "--temperature", "0", "--max-total-tokens", "300", "--no-progress"]


def test_rollout_end_to_end(processes, tmp_path, capsys):
    case, server = processes["trained"]
    out = tmp_path / "out.jsonl"
    words = ["rollout", *flags(case, server, tmp_path), "--out", str(out), "--samples", "2"]
    assert threadweaver(words) == 0
    rows = list(read_trajectories(out))
    assert {row["key"] for row in rows} == {f"{n}#{k}" for n in range(20) for k in range(2)}
    assert {row["status"] for row in rows} <= {"done", "length"}
    assert all(row["forked_threads"] >= 2 and row["logprobs"] for row in rows)
    assert all(call["replica"] == f"127.0.0.1:{server.port}" for row in rows for call in row["calls"])
    assert sum(row["cached_share"] > 0 for row in rows) > 20
    assert threadweaver(words) == 0
    assert "0 trajectories written" in capsys.readouterr().out
    assert threadweaver([*words[:-2], "--served-name", "nobody", "--out", str(tmp_path / "no.jsonl")]) == 1
    assert "does not serve 'nobody'; it serves ['model']" in capsys.readouterr().err


def test_killed_and_started_again_in_the_middle_of_a_run(processes):
    case, server = processes["random"]
    bench = Bench(case, server, None, load_tokenizer(str(case.folder)), Limits(max_total_tokens=400))
    engine = bench.remote(attempts=200, max_backoff_s=1.0)
    before = bench.decode(engine, bench.prompts, max_calls=4)
    answered, generate = [], engine.generate

    async def counted(request):
        answered.append(await generate(request))
        return answered[-1]

    engine.generate = counted
    early = sum(len(one.calls) for one in before) // 4
    # The server ends with the thread that started it, so this one starts it.
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(bench.decode, engine, bench.prompts, max_calls=4)
        while len(answered) < early and not running.done():
            time.sleep(0.001)
        server.stop(kill=True)
        server.start()
        after = running.result(600)
    assert [one.key for one in after] == [one.key for one in before]
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(before, after, strict=True))
    assert [one.status for one in after] == [one.status for one in before]
    assert max(call.attempts for one in after for call in one.calls) > 1
