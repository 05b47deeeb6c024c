"""benchmarks/bench_trie_attention.py on a CPU at toy size: it runs, judges, writes, and adds to earlier results."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks.attention_runs import RUNS, Judge, make_inputs

from benchmarks import bench_trie_attention
from tests.support.attention_inputs import chain_128k, sft_32k, sft_64k, short_64x1k, tiny


def test_the_benchmark_runs_and_adds_to_earlier_results(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    words = ["bench", "--cpu", "--cases", "tiny", "--rounds", "2", "--cases-only", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--impls", "dense,varlen"])
    assert bench_trie_attention.main() == 0
    monkeypatch.setattr(sys, "argv", [*words, "--impls", "reference,expanded_sdpa", "--merge", str(out)])
    assert bench_trie_attention.main() == 0
    assert "FAILED" not in capsys.readouterr().out
    found = json.loads(out.read_text())
    values = {(r["impl"], r["metric"]): r["value"] for r in found["records"] if r["case"] == "tiny"}
    for impl in ("dense", "varlen", "reference", "expanded_sdpa"):
        assert values[impl, "fwd_ms"] > 0
        assert values[impl, "bwd_tflops"] > 0
        assert max(values[impl, "out_error"], values[impl, "grad_error"]) < 1e-5
    assert len(found["meta"]["earlier"]) == 1


def test_the_judge_sees_a_wrong_result():
    """A time is reported beside a right answer: an implementation that forgets the trie must show."""
    inputs = make_inputs(tiny(), "cpu", 2, 1, 16, torch.float32)
    run = RUNS["dense"](inputs)
    causal = RUNS["dense"](replace(inputs, end=torch.full_like(inputs.end, inputs.trie.num_rows)))
    judge = Judge(inputs)
    assert max(judge.errors(run).values()) < 1e-5
    assert all(error > 0.01 for error in judge.errors(causal).values())


@pytest.mark.parametrize(
    ("trie", "rows", "share", "tokens", "pairs"),
    [
        (sft_32k, 32_278, 0.63, 5.18, 3.54),
        (sft_64k, 64_556, 0.315, 5.18, 3.54),
        (chain_128k, 131_072, 1.0, 1.0, 1.0),
        (short_64x1k, 65_536, 0.009, 1.75, 1.325),
    ],
)
def test_the_tries_are_those_of_the_tables(trie, rows, share, tokens, pairs):
    shape = trie()
    assert shape.num_rows == rows
    assert shape.visible_share == pytest.approx(share, abs=0.005)
    assert (shape.sharing_ratio, shape.pair_ratio) == pytest.approx((tokens, pairs), abs=0.01)
