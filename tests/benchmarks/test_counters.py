"""benchmarks/bench_counters.py: a CSV of Nsight Compute becomes records; the GPU's part is run by hand."""

import json

import pytest

from benchmarks import bench_counters

NAMES = ["ID", "Kernel Name", "gpu__time_duration.sum", "smsp__cycles_elapsed.avg.per_second"]
NAMES += ["sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active"]
NAMES += ["sm__pipe_tensor_op_imma_cycles_active.avg.pct_of_peak_sustained_active"]
NAMES += ["launch__shared_mem_per_block", "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"]
NAMES += ["smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio"]
KERNELS = [
    ("_forward_kernel", "3,650,000"),
    ("_dkv_kernel", "9,500,000"),
    ("_forward_kernel", "8,600,000"),
    ("_dkv_kernel", "26,000,000"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "3,600,000"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_helper", "100,000"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "9,000,000"),
]


def text(kernels):
    rows = [NAMES, ["", "", "ns", "hz", "%", "%", "byte/block", "inst", ""]]
    rows += [
        [str(i), name, ns, "1,700,000,000", "72.5", "0", "164,864", "1.5", "9"] for i, (name, ns) in enumerate(kernels)
    ]
    return "\n".join(["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in rows)])


def test_a_csv_becomes_records(tmp_path, capsys):
    raw, out = tmp_path / "ncu.csv", tmp_path / "counters.json"
    raw.write_text(text(KERNELS))
    assert bench_counters.main(["--read", str(raw), "--out", str(out)]) == 0
    found = {(r["case"], r["impl"], r["metric"]): r["value"] for r in json.loads(out.read_text())["records"]}
    assert found["chain_16k_fwd", "hopper", "ms"] == pytest.approx(3.65)
    assert found["sft_32k_bwd", "hopper", "ms"] == pytest.approx(26.0)
    assert found["chain_16k_bwd", "expanded_cudnn", "ms"] == pytest.approx(9.0)
    assert found["chain_16k_fwd", "hopper", "clock_ghz"] == pytest.approx(1.7)
    assert found["chain_16k_fwd", "hopper", "tensor_pct"] == 72.5
    assert found["chain_16k_fwd", "hopper", "shared_kib"] == 161
    assert found["chain_16k_fwd", "hopper", "tflops"] == pytest.approx(602.5, rel=1e-3)
    stalls = {metric for _, _, metric in found if metric.startswith("stall")}
    assert stalls == {"stall_long_scoreboard"}


def test_missing_and_foreign_kernels_are_named():
    with pytest.raises(ValueError, match=r"expected kernels of .* got"):
        bench_counters.records(text(KERNELS[:3]), bench_counters.JOBS)
    with pytest.raises(ValueError, match="kernel 'softmax' is none of"):
        bench_counters.records(text([("softmax", "1")]), bench_counters.JOBS)
