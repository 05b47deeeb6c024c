"""`rollout`: lines that SFT reads, going on after a kill, files of other runs, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.rollouts import FORKED, text_engine
from tw_core import TagIds, extract_units
from tw_recipes.cli import main as threadweaver
from tw_recipes.decoding.engine import EngineError
from tw_recipes.decoding.scripted_engine import ScriptedEngine
from tw_recipes.rollout import Prompt, RolloutFileError, finished_keys, read_trajectories, rollout
from tw_recipes.rollout_command import EngineOptions, RolloutOptions, make_decoder, run_rollout
from tw_recipes.sft.rows import row_to_trie


def options(model: Path, folder: Path, count: int = 3, **more) -> RolloutOptions:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"name": f"p{n}", "prompt": f"What is {n}?"}) + "\n" for n in range(count)))
    fields = {"prompts": prompts, "out": folder / "out.jsonl", "id_column": "name", "progress": False}
    engine = more.pop("engine", {})
    return RolloutOptions(**fields | more, engine=EngineOptions(str(model), **engine))


def test_lines_hold_everything_and_sft_reads_them(model, tokenizer, tmp_path):
    summary = run_rollout(options(model, tmp_path, samples=2), text_engine(tokenizer))
    assert (summary.written, summary.skipped, summary.statuses) == (6, 0, {"done": 6})
    rows = list(read_trajectories(tmp_path / "out.jsonl"))
    assert sorted(row["key"] for row in rows) == [f"p{n}#{k}" for n in range(3) for k in range(2)]
    row = next(row for row in rows if row["key"] == "p1#0")
    assert row["text"] == FORKED + tokenizer.eos_token
    assert row["prompt"] == "What is 1?"
    assert row["format_ok"] is True
    assert row["stats"]["num_threads"] == 2
    assert [call["kind"] for call in row["calls"]] == ["sequential", "thread", "thread", "sequential"]
    assert all(call["ended"] >= call["started"] >= call["queued"] >= 0 for call in row["calls"])
    assert [len(values) for values in row["logprobs"]] == [len(completion) for _, completion in row["units"]]
    assert summary.tokens == sum(row["generated_tokens"] for row in rows)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1?"}], add_generation_prompt=True)
    assert row["ids"][: row["prompt_length"]] == list(prompt["input_ids"])
    units = extract_units(row["ids"], TagIds.from_tokenizer(tokenizer), row["prompt_length"])
    for (context, completion), unit in zip(row["units"], units, strict=True):
        np.testing.assert_array_equal(context, unit.context)
        np.testing.assert_array_equal(completion, unit.completion)
    assert row_to_trie(row, tokenizer).num_sequences == 4


def test_going_on_skips_what_is_there_and_repairs_a_half_line(model, tokenizer, tmp_path):
    job = options(model, tmp_path, samples=2)
    run_rollout(job, text_engine(tokenizer))
    whole = job.out.read_bytes()
    lines = whole.splitlines(keepends=True)
    job.out.write_bytes(b"".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    summary = run_rollout(job, text_engine(tokenizer))
    assert (summary.written, summary.skipped) == (2, 4)
    assert job.out.read_bytes().startswith(b"".join(lines[:4]))
    assert len(finished_keys(job.out)[0]) == 6
    again = run_rollout(job, text_engine(tokenizer))
    assert (again.written, again.skipped) == (0, 6)


@pytest.mark.parametrize("content", ['{"precious": [1]}', '{"precious": [1]}\n', "no JSON"])
def test_a_file_of_something_else_is_left_as_it_is(model, tokenizer, tmp_path, content):
    job = options(model, tmp_path)
    job.out.write_text(content)
    message = r"line 1: expected a trajectory with a key and a status.*name another one"
    with pytest.raises(RolloutFileError, match=message):
        run_rollout(job, text_engine(tokenizer))
    assert job.out.read_text() == content
    assert not list(tmp_path.glob("*.settings.json"))


_CHILD = """
import sys
from tests.recipes.test_rollout import options
from tests.support.rollouts import text_engine
from tw_recipes.rollout_command import load_tokenizer, run_rollout
from dataclasses import replace
from pathlib import Path
model, folder = map(Path, sys.argv[1:])
run_rollout(options(model, folder, 40, concurrency=4), text_engine(load_tokenizer(str(model)), latency=0.02))
"""


def test_kill_9_loses_and_doubles_nothing(model, tokenizer, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(model), str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    out, deadline = tmp_path / "out.jsonl", time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = out.read_bytes().count(b"\n")
    assert 6 <= before < 40
    summary = run_rollout(options(model, tmp_path, 40), text_engine(tokenizer))
    assert summary.skipped + summary.written == 40
    assert summary.skipped == before
    keys = [row["key"] for row in read_trajectories(out)]
    assert sorted(keys) == sorted(f"p{n}#0" for n in range(40))


def test_other_settings_and_broken_files_are_refused(model, tokenizer, tmp_path):
    job = options(model, tmp_path)
    run_rollout(job, text_engine(tokenizer))
    with pytest.raises(RolloutFileError, match=r"was made with temperature=0.6, got 0.0; give the same settings"):
        run_rollout(options(model, tmp_path, engine={"temperature": 0.0}), text_engine(tokenizer))
    lines = job.out.read_bytes().splitlines(keepends=True)
    for broken in (b'{"no": 1}\n', b'{"key": null}\n', b'{"key": ["a"]}\n'):
        job.out.write_bytes(lines[0] + broken + lines[1])
        with pytest.raises(RolloutFileError, match="line 2: expected a trajectory with a key"):
            run_rollout(job, text_engine(tokenizer))
        assert job.out.read_bytes().endswith(lines[1]), "a null for a key cut off all that follows"
    job.out.write_bytes(lines[0] * 2)
    with pytest.raises(RolloutFileError, match=r"line 2: key .* stands twice"):
        run_rollout(job, text_engine(tokenizer))


def test_an_engine_failure_is_a_line_with_its_reason(model, tokenizer, tmp_path):
    engine = ScriptedEngine([EngineError("server is gone")], [tokenizer.eos_token_id])
    summary = run_rollout(options(model, tmp_path, 2), engine)
    assert (summary.failed, summary.statuses) == (1, {"error": 1, "done": 1})
    failed = next(row for row in read_trajectories(tmp_path / "out.jsonl") if row["status"] == "error")
    assert "server is gone" in failed["reason"]


def test_going_on_decodes_again_what_an_engine_lost(model, tokenizer, tmp_path):
    job = options(model, tmp_path, 2)
    run_rollout(job, ScriptedEngine([EngineError("server is gone")], [tokenizer.eos_token_id]))
    kept = [line for line in job.out.read_bytes().splitlines(keepends=True) if b"server is gone" not in line]
    assert len(kept) == 1
    summary = run_rollout(job, text_engine(tokenizer))
    assert (summary.written, summary.skipped, summary.again, summary.failed) == (1, 1, 1, 0)
    assert "1 had failed before" in str(summary)
    assert job.out.read_bytes().startswith(kept[0])
    assert {row["status"] for row in read_trajectories(job.out)} == {"done"}
    assert list(tmp_path.glob("*.part")) == []


def test_prompts_are_read_only_as_fast_as_they_are_decoded(model, tokenizer, tmp_path):
    out, ahead = tmp_path / "out.jsonl", []

    def prompts():
        for n in range(30):
            ahead.append(n - (out.read_bytes().count(b"\n") if out.exists() else 0))
            yield Prompt(str(n), [65, n])

    rollout(prompts(), make_decoder(EngineOptions(str(model)), tokenizer, text_engine(tokenizer)), tokenizer, out,
            concurrency=3)  # fmt: skip
    assert len(finished_keys(out)[0]) == 30
    assert max(ahead) <= 3


def test_latency_is_that_of_what_ran_at_once(model, tokenizer, tmp_path):
    """A limit on blocks makes the second block plain text of one call; its tags must not shorten the path."""
    block = FORKED[FORKED.index("<Parallel>") : FORKED.index("So")]
    text, rest = FORKED + block, tokenizer.encode("So \\boxed{7}." + block, add_special_tokens=False)
    engine, plain = text_engine(tokenizer), text_engine(tokenizer).script
    join = tokenizer.convert_tokens_to_ids("</Parallel>")

    def answer(request):
        line = plain(request)
        return [join, *tokenizer.encode("\n"), *rest, tokenizer.eos_token_id] if line[0] == join else line

    engine.script = answer
    run_rollout(options(model, tmp_path, 1, engine={"max_blocks": 1}), engine)
    one = next(read_trajectories(tmp_path / "out.jsonl"))
    assert one["text"] == text + tokenizer.eos_token
    assert one["stats"]["num_blocks"] == 2
    assert (one["forks"], one["forked_threads"]) == (1, 2)
    saved = len(tokenizer.encode(" three\n</Thread>", add_special_tokens=False))
    assert one["token_latency"] == one["stats"]["total_tokens"] - saved
    assert one["token_latency"] > one["stats"]["critical_path_tokens"]


def test_a_repeated_id_is_refused(model, tokenizer, tmp_path):
    decoder = make_decoder(EngineOptions(str(model)), tokenizer, text_engine(tokenizer))
    with pytest.raises(ValueError, match="prompt id 'a' stands twice"):
        rollout([Prompt("a", [65]), Prompt("a", [66])], decoder, tokenizer, tmp_path / "out.jsonl")


def test_the_command_with_a_tiny_random_model(model, tmp_path, capsys):
    job = options(model, tmp_path, 2)
    flags = ["rollout", str(job.prompts), "--out", str(job.out), "--model", str(model), "--max-total-tokens", "24"]
    assert threadweaver(flags) == 0
    assert "2 trajectories written" in capsys.readouterr().out
    rows = list(read_trajectories(job.out))
    assert {row["key"] for row in rows} == {"0#0", "1#0"}
    assert all(row["status"] in ("done", "length") for row in rows)
    assert all(0 < row["generated_tokens"] <= 24 for row in rows)


def test_progress_shows_counts_speed_and_time_left(model, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")  # the last state alone, without control codes
    monkeypatch.setenv("COLUMNS", "120")
    job = options(model, tmp_path, progress=True)
    assert run_rollout(job, text_engine(tokenizer)).written == 3
    shown = capsys.readouterr().err
    assert re.search(r"rollout .* 3/3 +[1-9][\d,]* tokens/s +0:00:\d\d +left +0:00:00", shown)
    run_rollout(replace(job, samples=2), text_engine(tokenizer))  # those of the first run count as done
    assert "6/6" in capsys.readouterr().err


def test_exit_status_of_bad_input(model, tmp_path, capsys):
    flags = ["--out", str(tmp_path / "o.jsonl"), "--model", str(model)]
    assert threadweaver(["rollout", str(tmp_path / "none.jsonl"), *flags]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert threadweaver(["rollout", str(options(model, tmp_path).prompts), *flags, "--limit", "-1"]) == 1
    assert "limit must be at least 1, got -1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong:
        threadweaver(["rollout"])
    assert wrong.value.code == 2
