"""The report: counts, examples, histograms, cost; the same in JSON and Markdown."""

import json

import numpy as np

from tw_recipes.datagen.accounting import Usage
from tw_recipes.datagen.mix import Mix
from tw_recipes.datagen.reasons import EXPLAINED, Reason
from tw_recipes.datagen.report import EXAMPLES, write_report


def record(place: int, kind: str, *reasons: Reason, **more) -> dict:
    dropped = [{"reason": reason, "detail": f"why <{place}> | x", "block": None} for reason in reasons]
    return {"id": f"r{place}", "kind": kind, "dropped": dropped, "repairs": 0} | more


def test_counts_examples_and_measures(tmp_path):
    records = [record(n, "sequential", Reason.BLOCK_GAP, Reason.CHECK_DEPENDENT) for n in range(5)]
    records.append(record(5, "rejected", Reason.INPUT_WRONG))
    records += [
        record(6, "forkjoin", Reason.BLOCK_GAP, acceleration=0.31, edit_ratio=0.0, threads=[2, 3], repairs=2),
        record(7, "forkjoin", acceleration=1.0, edit_ratio=0.2, threads=[3]),
    ]
    usage = {("steps", "m"): Usage(3, 1, 100, 20, 0.5, 1.0), ("check", "m"): Usage(2, 0, 50, 10, 0.25, 1.0)}
    found = write_report(tmp_path, iter(records), usage, Mix(2, 1, 0, 4), stopped="no money")
    assert found.kinds == {"sequential": 5, "rejected": 1, "forkjoin": 2}
    assert found.reasons == {"block_gap": 6, "check_dependent": 5, "input_wrong": 1}
    assert found.threads == {2: 1, 3: 2}
    assert found.mean_gain == (0.31 + 1.0) / 2
    assert (np.flatnonzero(found.gains).tolist(), np.flatnonzero(found.edits).tolist()) == ([12, 39], [0, 8])

    data = json.loads((tmp_path / "report.json").read_text())
    assert data["reasons"]["block_gap"]["count"] == 6
    assert data["reasons"]["block_gap"]["meaning"] == EXPLAINED[Reason.BLOCK_GAP]
    assert [e["id"] for e in data["reasons"]["block_gap"]["examples"]] == ["r0", "r1", "r2"][:EXAMPLES]
    assert (data["stopped"], data["repairs"], data["threads_per_block"]) == ("no money", 2, {"2": 1, "3": 2})
    assert data["usage"][0] | {"question": "check", "calls": 2, "prompt_tokens": 50} == data["usage"][0]

    text = (tmp_path / "report.md").read_text()
    assert "Stopped early: no money" in text
    assert "| block_gap | 6 |" in text
    assert "why &lt;0> \\| x" in text
    assert "| all |  | 5 | 1 | 150 | 30 | 0.7500 |" in text
    assert (tmp_path / "reasons.png").read_bytes()[1:4] == (tmp_path / "gains.png").read_bytes()[1:4] == b"PNG"


def test_a_job_without_a_record_has_a_report_too(tmp_path):
    found = write_report(tmp_path, [], {}, None)
    assert (found.mean_gain, json.loads((tmp_path / "report.json").read_text())["mix"]) == (0.0, None)
