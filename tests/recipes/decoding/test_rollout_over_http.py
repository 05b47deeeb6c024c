"""`threadweaver rollout --base-url`: the command on servers, on one that is lost, on one that is not there."""

import json

import pytest

from tests.support.rollouts import FORKED, model_folder, text_engine
from tw_recipes.cli import main as threadweaver
from tw_recipes.rollout import read_trajectories
from tw_recipes.rollout_command import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def words(folder, tmp_path, *servers):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(12)))
    urls = [server.url for server in servers]
    return [
        *("rollout", str(prompts), "--model", str(folder), "--served-name", "model", "--base-url", *urls),
        *("--out", str(tmp_path / "out.jsonl"), "--max-total-tokens", "400", "--no-progress"),
    ]


def test_the_command_on_two_servers(serve, folder, tmp_path, capsys):
    tokenizer = load_tokenizer(str(folder))
    servers = [serve(text_engine(tokenizer).script, max_context=512) for _ in range(2)]
    assert threadweaver(words(folder, tmp_path, *servers)) == 0
    assert "12 trajectories written" in capsys.readouterr().out
    rows = list(read_trajectories(tmp_path / "out.jsonl"))
    assert sorted(row["key"] for row in rows) == sorted(f"{n}#0" for n in range(12))
    assert {row["text"] for row in rows} == {FORKED + tokenizer.eos_token}
    assert {row["forked_threads"] for row in rows} == {2}
    homes = [{call["replica"] for call in row["calls"]} for row in rows]
    assert all(len(home) == 1 for home in homes)
    assert set.union(*homes) == {server.name for server in servers}
    assert all(row["cached_share"] > 0 and row["logprobs"] for row in rows)


def test_a_lost_server_ends_in_exit_status_1_and_rows_that_say_why(serve, folder, tmp_path, monkeypatch, capsys):
    from tw_recipes.decoding import openai_engine

    made = openai_engine.OpenAIEngine.__init__
    quick = {"attempts": 2, "backoff_s": 0.01, "max_backoff_s": 0.01}
    monkeypatch.setattr(openai_engine.OpenAIEngine, "__init__", lambda self, *args: made(self, *args, **quick))
    server = serve(text_engine(load_tokenizer(str(folder))).script, max_context=512)
    server.fault = lambda number, body: server.kill() or "reset" if number == 20 else ""
    assert threadweaver(words(folder, tmp_path, server)) == 1
    rows = list(read_trajectories(tmp_path / "out.jsonl"))
    lost = [row for row in rows if row["status"] == "error"]
    assert len(rows) == 12
    assert lost
    assert all(f"{server.name}: connection failed" in row["reason"] for row in lost)
    assert f"{len(lost)} trajectories failed" in capsys.readouterr().err


def test_a_server_that_is_not_there_ends_the_command_before_it_writes(serve, folder, tmp_path, capsys):
    server = serve()
    server.kill()
    assert threadweaver(words(folder, tmp_path, server)) == 1
    assert f"threadweaver rollout: {server.name} does not answer GET /v1/models" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
