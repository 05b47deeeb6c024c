"""benchmarks/bench_grpo.py at toy size: it runs, both sides have one gradient, and the ratios belong together."""

import json

import pytest
import torch
from benchmarks.bench_grpo import main

from benchmarks import bench_grpo
from tw_recipes import checkpoint_graphs


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
        assert 0 < values["trie", "gradient_difference"] < 1e-4
        assert values["trie", "speedup"] == pytest.approx(
            values[other, "step_ms"] / values["trie", "step_ms"], rel=1e-4
        )
        assert values["trie", "sharing_efficiency"] == pytest.approx(
            values["trie", "speedup"] / values["trie", "flop_ratio"], rel=1e-4
        )
        assert values["trie", "sharing_ratio"] > values["trie", "flop_ratio"] > 2


def test_graphs_have_the_same_gradients(tmp_path, monkeypatch):
    used = []
    forward = checkpoint_graphs._LayerGraphs.forward
    monkeypatch.setattr(checkpoint_graphs._LayerGraphs, "forward", lambda self: (used.append(self), forward(self)))
    words = ["--tiny", "--graphs", "--repeats", "1", "--cases", "p24_c8", "--out", str(tmp_path / "grpo.json")]
    assert main(words) == 0
    records = json.loads((tmp_path / "grpo.json").read_text())["records"]
    assert {record["case"] for record in records} == {"tiny_lora_graphs/p24_c8", "tiny_full_graphs/p24_c8"}
    assert all(record["value"] < 1e-4 for record in records if record["metric"] == "gradient_difference")
    assert len(set(used)) == 4  # layers of the two models


@pytest.mark.slow  # Inductor compiles C++ for a minute
def test_compiled_layers_have_the_same_gradients(tmp_path):
    torch._dynamo.reset()
    words = ["--tiny", "--compile", "--repeats", "1", "--cases", "p24_c8", "--out", str(tmp_path / "grpo.json")]
    assert main(words) == 0
    records = json.loads((tmp_path / "grpo.json").read_text())["records"]
    assert {record["case"] for record in records} == {"tiny_lora_compiled/p24_c8", "tiny_full_compiled/p24_c8"}
    assert all(record["value"] < 1e-4 for record in records if record["metric"] == "gradient_difference")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_a_case_is_written_when_it_is_done_and_added_to_earlier_ones(tmp_path, monkeypatch):
    path, measured = tmp_path / "grpo.json", bench_grpo.measure

    def cut(trainer, batch, *rest):
        if batch.inputs["prompt_ids"].shape[1] != 24:
            raise KeyboardInterrupt
        return measured(trainer, batch, *rest)

    monkeypatch.setattr(bench_grpo, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        main(["--tiny", "--repeats", "1", "--cases", "p24_c8,p12_c8", "--out", str(path)])
    monkeypatch.setattr(bench_grpo, "measure", measured)
    assert main(["--tiny", "--repeats", "1", "--cases", "p12_c8", "--merge", str(path), "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    cases = {record["case"] for record in found["records"]}
    assert cases == {"tiny_lora/p24_c8", "tiny_lora/p12_c8", "tiny_full/p12_c8"}
    assert found["meta"]["trie_attention"] == "dense"


def test_the_gradient_difference_sees_a_direction():
    ours, theirs = [torch.tensor([3.0, 4.0]), torch.zeros(2)], [torch.tensor([4.0, 3.0]), torch.zeros(2)]
    assert bench_grpo.difference(ours, theirs) == pytest.approx(2**0.5 / 5)
