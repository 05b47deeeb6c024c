"""benchmarks/bench_sft.py at toy size: it runs, and the trie run has the losses of the expanded run."""

import json

import pytest
from benchmarks.bench_sft import loss_curve, main


def test_the_benchmark_runs_and_agrees(tmp_path):
    assert main(["--tiny", "--steps", "3", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sft-cpu.json").read_text())
    values = {(r["impl"], r["metric"]): r["value"] for r in found["records"]}
    assert values["trie", "sharing_ratio"] > 3
    assert values["trie", "flop_ratio"] > 2
    assert values["trie", "sharing_efficiency"] == pytest.approx(
        values["trie", "speedup"] / values["trie", "flop_ratio"], rel=1e-4
    )
    losses = {impl: loss_curve(found["records"], "tiny", impl) for impl in ("trie", "expanded")}
    assert losses["trie"] == pytest.approx(losses["expanded"], rel=1e-4)
    assert len(losses["trie"]) == 3
    assert losses["trie"][-1] < losses["trie"][0]
    assert (tmp_path / "sft_loss-cpu.png").stat().st_size > 1000
