"""benchmarks/bench_sft.py at toy size: it runs, and the trie run has the losses of the expanded run."""

import json

import pytest
from benchmarks.bench_sft import curve, main

from benchmarks import bench_sft


def test_the_benchmark_runs_and_agrees(tmp_path):
    assert main(["--tiny", "--steps", "3", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sft-cpu.json").read_text())
    values = {(r["impl"], r["metric"]): r["value"] for r in found["records"]}
    assert values["trie", "sharing_ratio"] > 3
    assert values["trie", "flop_ratio"] > 2
    assert values["trie", "sharing_efficiency"] == pytest.approx(
        values["trie", "speedup"] / values["trie", "flop_ratio"], rel=1e-4
    )
    losses = {impl: curve(found["records"], "tiny", impl) for impl in ("trie", "expanded")}
    assert losses["trie"] == pytest.approx(losses["expanded"], rel=1e-4)
    assert len(losses["trie"]) == 3
    assert losses["trie"][-1] < losses["trie"][0]
    assert (tmp_path / "sft_loss-cpu.png").stat().st_size > 1000


def test_a_run_that_was_cut_goes_on(tmp_path, monkeypatch):
    words = ["--tiny", "--steps", "2", "--out", str(tmp_path)]
    path, trained = tmp_path / "sft-cpu.json", bench_sft.train

    def cut(model, steps, *rest):
        for i, found in enumerate(trained(model, steps, *rest)):
            if len(steps[0]) > 1 and i == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(bench_sft, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--row-budget", "200"])
    first = json.loads(path.read_text())["records"]
    assert (tmp_path / "sft_loss-cpu.png").stat().st_size > 1000
    assert [len(curve(first, "tiny", impl)) for impl in ("trie", "expanded")] == [2, 1]
    assert {r["metric"]: r["value"] for r in first}["steps_compared"] == 1
    monkeypatch.setattr(bench_sft, "train", trained)
    assert main([*words, "--merge", str(path), "--reuse"]) == 0
    found = json.loads(path.read_text())["records"]
    for of in ("loss", "ms"):
        assert curve(found, "tiny", "trie", of).tolist() == curve(first, "tiny", "trie", of).tolist(), "it ran again"
    assert len(curve(found, "tiny", "expanded")) == 2
    assert {r["metric"]: r["value"] for r in found}["steps_compared"] == 2
