"""Figures of a stage come from the responses: accuracy, critical path, forks, threads that read as they should."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3ForCausalLM

from tw_core import TagIds
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.decoding.engine import GREEDY, EngineError
from tw_recipes.decoding.limits import Limits
from tw_recipes.decoding.scripted_engine import ScriptedEngine
from tw_recipes.pipelines.reproduce import measure
from tw_recipes.rollout import trajectory_row
from tw_recipes.sft.rows import text_units
from tw_recipes.tasks import SumOfProducts
from tw_recipes.tasks.model import tiny_model

TASK = SumOfProducts(2)
TOKENIZER = TASK.tokenizer()
FORKED, PLAIN = (TASK.rows(3, seed=0, split="test", style=style) for style in ("forkjoin", "sequential"))


def _trajectory(row: dict[str, str], text: str) -> dict[str, Any]:
    """What a model that writes `text` gives."""
    tags = TagIds.from_tokenizer(TOKENIZER)
    answers = {tuple(unit.context): list(unit.completion) for unit in text_units(row["prompt"], text, TOKENIZER)}
    engine = ScriptedEngine(lambda request: answers[tuple(request.context)], eos_ids=[TOKENIZER.eos_token_id])
    decoder = ForkJoinDecoder(engine, tags, Limits(), GREEDY)
    return trajectory_row(decoder.decode_all([TOKENIZER.encode(row["prompt"])])[0], TOKENIZER, units=False)


def test_figures_of_right_and_wrong_responses() -> None:
    wrong = FORKED[2]["text"].replace("\\boxed{", "\\boxed{9")
    found = measure.figures(
        [
            _trajectory(FORKED[0], FORKED[0]["text"]),
            _trajectory(PLAIN[1], PLAIN[1]["text"]),
            _trajectory(FORKED[2], wrong),
        ],
        FORKED,
        TASK.grader(),
    )
    assert found["correct"] == [True, True, False]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_low"] < 2 / 3 < found["accuracy_high"]
    assert found["activation_ratio"] == pytest.approx(2 / 3)
    assert found["format_correctness"] == found["finished"] == 1
    assert found["threads"] == pytest.approx(4 / 3)
    plain = len(TOKENIZER.encode(PLAIN[1]["text"])) + 1
    assert (found["tokens"][1], found["latency"][1]) == (plain, plain)
    assert found["latency"][0] < found["tokens"][0]
    assert found["token_latency"] == pytest.approx(sum(found["latency"]) / 3)
    assert found["threads_right"] == {"first": 1.0, "later": 1.0}


def test_what_an_engine_lost_is_decoded_again_and_not_graded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model(TOKENIZER, seed=0)
    rows, file = PLAIN[:2], tmp_path / "trajectories.jsonl"
    engines = [
        ScriptedEngine([[TOKENIZER.eos_token_id], EngineError("out of memory")], eos_ids=[TOKENIZER.eos_token_id]),
        ScriptedEngine([[TOKENIZER.eos_token_id]], eos_ids=[TOKENIZER.eos_token_id]),
    ]
    monkeypatch.setattr(measure, "LockstepEngine", lambda *_, **__: engines.pop(0))
    limits = measure.limits_for(rows, TOKENIZER, fork=False)
    with pytest.raises(RuntimeError, match=r"not every problem has a trajectory: .*out of memory.*run again"):
        measure.decode(model, TOKENIZER, rows, file, limits=limits)
    found = measure.decode(model, TOKENIZER, rows, file, limits=limits)
    assert [row["status"] for row in found] == ["done", "done"]


def test_threads_are_compared_by_their_place() -> None:
    text = FORKED[0]["text"]
    first, second = text.index("<Thread>\n1:"), text.index("<Thread>\n2:")
    spoiled = text[:second] + text[second:].replace("*", "=", 1)
    assert measure.threads_right([spoiled], [text]) == {"first": 1.0, "later": 0.0}
    spoiled = text[:first] + text[first:].replace("*", "=", 1)
    assert measure.threads_right([spoiled], [text]) == {"first": 0.0, "later": 1.0}
    # A response without forks says nothing about threads.
    assert measure.threads_right([PLAIN[0]["text"]], [text]) == {"first": None, "later": None}
    assert measure.threads_right([PLAIN[0]["text"], text], [text, text]) == {"first": 1.0, "later": 1.0}


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model(TOKENIZER, hidden_size=16, layers=1, heads=2, context=512).eval()


def test_decoding_goes_on_and_repeats_itself(model: Any, tmp_path: Path) -> None:
    limits = Limits(max_total_tokens=24, max_thread_tokens=8)
    whole = measure.decode(model, TOKENIZER, FORKED, tmp_path / "one.jsonl", limits=limits)
    assert [row["answer"] for row in whole] == [row["answer"] for row in FORKED]
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text(lines[0] + lines[1][:20])  # killed in the second line
    again = measure.decode(model, TOKENIZER, FORKED, tmp_path / "two.jsonl", limits=limits)
    assert [row["ids"] for row in again] == [row["ids"] for row in whole]
    assert (tmp_path / "two.jsonl").read_text().startswith(lines[0])


def test_a_lost_call_stops_the_measurement(model: Any, tmp_path: Path) -> None:
    limits = Limits(max_total_tokens=8)
    spoiled = tiny_model(TOKENIZER, hidden_size=16, layers=1, heads=2, context=32)
    rows = [{**FORKED[0], "prompt": FORKED[0]["prompt"] * 4}]
    with pytest.raises(RuntimeError, match=r"not every problem has a trajectory: the prompt has \d+ tokens and"):
        measure.decode(spoiled, TOKENIZER, rows, tmp_path / "t.jsonl", limits=limits)


def test_wall_clock_of_each_batch_size(model: Any) -> None:
    limits = Limits(max_total_tokens=6)
    found = measure.wall_clock(model, TOKENIZER, FORKED, limits=limits, batches=(1, 4), timed=2)
    assert list(found) == ["1", "4"]
    assert all(0 < seconds < 60 for seconds in found.values())


def test_limits_leave_room_over_the_longest_solution() -> None:
    longest = max(len(TOKENIZER.encode(row["text"])) for row in FORKED)
    limits = measure.limits_for(FORKED, TOKENIZER, fork=True)
    assert longest < limits.max_total_tokens < 1.3 * longest + 20
    assert limits.forks
    assert not measure.limits_for(FORKED, TOKENIZER, fork=False).forks
