"""benchmarks/bench_grpo.py at toy size: it runs, both sides have one gradient, and the ratios belong together."""

import json

import pytest
from benchmarks.bench_grpo import main


def test_the_benchmark_runs_and_agrees(tmp_path):
    path = tmp_path / "grpo.json"
    assert main(["--tiny", "--repeats", "1", "--out", str(path)]) == 0
    found = {}
    for record in json.loads(path.read_text())["records"]:
        found.setdefault(record["case"], {})[record["impl"], record["metric"]] = record["value"]
    assert found.keys() == {"tiny_lora/p24_c8", "tiny_lora/forkjoin_0.3k", "tiny_full/p24_c8_x2"}
    for case, values in found.items():
        other = "units" if "forkjoin" in case else "stock"
        assert values["trie", "gradient_norm"] == pytest.approx(values[other, "gradient_norm"], rel=1e-4)
        assert values["trie", "speedup"] == pytest.approx(
            values[other, "step_ms"] / values["trie", "step_ms"], rel=1e-4
        )
        assert values["trie", "sharing_efficiency"] == pytest.approx(
            values["trie", "speedup"] / values["trie", "flop_ratio"], rel=1e-4
        )
        assert values["trie", "sharing_ratio"] > values["trie", "flop_ratio"] > 2
