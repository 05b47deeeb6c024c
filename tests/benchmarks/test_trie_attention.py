"""benchmarks/bench_trie_attention.py on a CPU at toy size: it runs, judges, writes, and adds to earlier results."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks.attention_runs import RUNS, Judge, make_inputs

from benchmarks import bench_trie_attention
from tests.support.attention_inputs import chain_128k, sft_32k, sft_64k, sft_800, short_64x1k, tiny


def test_the_benchmark_runs_and_adds_to_earlier_results(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    words = ["bench", "--cpu", "--cases", "tiny", "--rounds", "2", "--parts", "cases", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--impls", "dense,varlen"])
    assert bench_trie_attention.main() == 0
    monkeypatch.setattr(
        sys, "argv", [*words, "--impls", "reference,expanded_sdpa,sdpa_equal_chain", "--merge", str(out)]
    )
    assert bench_trie_attention.main() == 0
    assert "FAILED" not in capsys.readouterr().out
    found = json.loads(out.read_text())
    values = {(r["impl"], r["metric"]): r["value"] for r in found["records"] if r["case"] == "tiny"}
    for impl in ("dense", "varlen", "reference", "expanded_sdpa", "sdpa_equal_chain"):
        assert values[impl, "fwd_ms"] > 0
        assert values[impl, "bwd_tflops"] > 0
    for impl in ("dense", "varlen", "reference", "expanded_sdpa"):
        assert max(values[impl, "out_error"], values[impl, "grad_error"]) < 1e-5
    assert len(found["meta"]["earlier"]) == 1


def test_ratios_of_one_run_stay_and_those_across_runs_are_named():
    def rows(impl, *times, metrics=("fwd_ms", "bwd_ms", "fwd_tflops", "bwd_tflops", "total_ms"), case="sft_32k"):
        found = zip(metrics, times, strict=False)
        return [{"case": case, "impl": impl, "metric": m, "value": value, "unit": ""} for m, value in found]

    kept = rows("triton", 2.0, 6.0, 400.0, 300.0, 10.0) + rows("triton", 1.5, metrics=["fwd_vs_flex"])
    anew = rows("flex", 4.0, 9.0, 200.0, 200.0, 15.0) + rows("hopper", 1.0, 3.0, 600.0, 500.0)
    anew += rows("expanded_cudnn", 8.0, 24.0, 100.0, 75.0) + rows("cudnn_equal_chain", 1.0, 3.0, 800.0, 600.0)
    added, across = bench_trie_attention.ratios(kept + anew, {(row["case"], row["impl"]) for row in anew})
    found = {(row["impl"], row["metric"]): row["value"] for row in added}
    assert ("triton", "fwd_vs_flex") not in found, "measured in the same rounds, it stays as it is"
    assert [found["triton", f"{m}_vs_flex"] for m in ("bwd", "total")] == [1.5, 1.5]
    assert [found["hopper", f"{m}_vs_flex"] for m in ("fwd", "bwd")] == [4.0, 3.0]
    assert [found[impl, "fwd_bwd_vs_expanded_cudnn"] for impl in ("hopper", "triton")] == [8.0, 4.0]
    assert [found["hopper", f"{m}_vs_equal_chain"] for m in ("fwd", "bwd")] == [0.75, pytest.approx(5 / 6)]
    assert not [name for name in found if name[0] == "cudnn_equal_chain" or name == ("flex", "fwd_vs_flex")]
    assert {name for name in across if " hopper " in name} == set()
    assert "sft_32k triton bwd_vs_flex" in across


def test_the_chain_of_equal_flops_has_the_pairs_of_the_trie():
    inputs = make_inputs(sft_800(), "cpu", 2, 1, 16, torch.float32)
    run = RUNS["sdpa_equal_chain"](inputs)
    assert run.forward_flop == pytest.approx(inputs.forward_flop, rel=0.3), "N is rounded to 128"
    assert len(run.forward()) % 128 == 0
    long = short_64x1k()
    rows = round((2 * long.visible_pairs) ** 0.5 / 128) * 128
    assert rows * (rows + 1) / 2 == pytest.approx(long.visible_pairs, rel=0.03)


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
