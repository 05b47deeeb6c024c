"""Hardware counters of the attention kernels, by Nsight Compute -> benchmarks/results/hopper_counters-<device>.json.

    python -m benchmarks.bench_counters                     on a GPU with ncu in PATH and leave to read counters
    python -m benchmarks.bench_counters --read FILE         the records of a CSV that ncu wrote before

The main kernel of a forward and of a backward, each launched once after a warm-up of the same call, with caches flushed
and the clock left alone: what stands around it (planning, statistics, conversion of dq, host) is not in these figures.
cuDNN's kernels on the chain stand beside. Guarded by tests/benchmarks/test_counters.py.
"""

import argparse
import csv
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from benchmarks.attention_runs import RUNS, make_inputs
from benchmarks.records import command_line, write_records
from tests.support import attention_inputs

HEADS, KV_HEADS, DIM = 32, 8, 128
JOBS = [("chain_16k", "hopper"), ("sft_32k", "hopper"), ("chain_16k", "expanded_cudnn")]
KERNELS = {
    "hopper": {"fwd": r"_forward_kernel", "bwd": r"_dkv_kernel"},
    "expanded_cudnn": {"fwd": r"sdpa.*fprop", "bwd": r"sdpa.*bprop"},
}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")
SECTIONS += ("LaunchStats", "Occupancy")
PCT = r"\.avg\.pct_of_peak_sustained_(active|elapsed)"
# metric of ours -> (what ncu calls it, by preference: names differ between chips and versions; factor; unit)
COUNTERS: dict[str, tuple[tuple[str, ...], float, str]] = {
    "ms": ((r"gpu__time_duration\.sum",), 1e-6, "ms"),
    "clock_ghz": ((r"(smsp|sm|gpc)__cycles_elapsed\.avg\.per_second",), 1e-9, "GHz"),
    "tensor_pct": ((rf"sm__pipe_tensor\w*cycles_active{PCT}", rf"sm__inst_executed_pipe_tensor\w*{PCT}"), 1, "%"),
    "xu_pct": ((rf"sm__inst_executed_pipe_xu{PCT}",), 1, "%"),
    "issue_pct": ((rf"(smsp|sm)__(inst_issued|issue_active){PCT}", rf"sm__instruction_throughput{PCT}"), 1, "%"),
    "l2_pct": ((rf"lts__throughput{PCT}",), 1, "%"),
    "dram_pct": ((rf"(gpu__)?dram_+throughput{PCT}",), 1, "%"),
    "l2_hit_pct": ((r"lts__t_sector_hit_rate\.pct",), 1, "%"),
    "warps_pct": ((rf"sm__warps_active{PCT}",), 1, "%"),
    "registers": ((r"launch__registers_per_thread",), 1, "registers"),
    "shared_kib": ((r"launch__shared_mem_per_block",), 2**-10, "KiB"),
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)(?<!_not_issued)_per_issue_active\.ratio")


def launch(jobs: Iterable[tuple[str, str]]) -> None:
    """What ncu looks at: every job once unseen, then once between the profiler's start and stop."""
    for case, impl in jobs:
        trie = getattr(attention_inputs, case)()
        run = RUNS[impl](make_inputs(trie, "cuda", HEADS, KV_HEADS, DIM, torch.bfloat16))
        for seen in (False, True):
            torch.cuda.synchronize()
            if seen:
                torch.cuda.profiler.start()
            torch.autograd.grad(run.forward(), run.leaves, run.grad_out)
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(path: Path) -> None:
    """Run `launch` under ncu, whose CSV goes to `path`; RuntimeError where ncu is missing or fails."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        raise RuntimeError("ncu was not found in PATH; install Nsight Compute, which is part of the CUDA toolkit")
    names = "|".join(name for kernels in KERNELS.values() for name in kernels.values())
    words = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--kernel-name", f"regex:{names}"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    words += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(path), "--target-processes", "all"]
    done = subprocess.run([*words, sys.executable, "-W", "ignore", "-m", "benchmarks.bench_counters", "--launch"])
    if done.returncode:
        said = path.read_text()[-2000:] if path.exists() else ""
        raise RuntimeError(f"ncu ended with {done.returncode}: {said}")


def kernels(text: str) -> Iterator[dict[str, str]]:
    """One dict of ncu's own metrics a kernel, in the order of the launches. The second line of the CSV holds units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = csv.DictReader(lines)
    next(rows, None)
    yield from rows


def counters(row: dict[str, str]) -> dict[str, tuple[float, str]]:
    """The metrics of `COUNTERS` that one kernel has, and the warps' stalls in cycles per instruction issued."""
    found: dict[str, tuple[float, str]] = {}

    def number(name: str) -> float:
        return float(row[name].replace(",", ""))

    for metric, (patterns, factor, unit) in COUNTERS.items():
        matching = ([name for name in row if re.fullmatch(pattern, name) and row[name]] for pattern in patterns)
        # Of several (a pipe's variants) the busiest: the others are not used.
        if names := next(filter(None, matching), None):
            found[metric] = (max(map(number, names)) * factor, unit)
    stalls = {match[1]: number(name) for name in row if (match := STALL.fullmatch(name)) and row[name]}
    return found | {f"stall_{reason}": (value, "cycles") for reason, value in stalls.items()}


def label(name: str) -> tuple[str, str]:
    """Implementation and pass of a kernel's name."""
    for impl, patterns in KERNELS.items():
        for part, pattern in patterns.items():
            if re.search(pattern, name):
                return impl, part
    raise ValueError(f"kernel {name!r} is none of {KERNELS}")


def records(text: str, jobs: list[tuple[str, str]]) -> list[dict[str, object]]:
    """Records of a CSV of ncu; of neighbours with one label the longest, since cuDNN launches helpers."""
    groups = itertools.groupby(kernels(text), key=lambda row: label(row["Kernel Name"]))
    wanted = [(case, impl, part) for case, impl in jobs for part in ("fwd", "bwd")]
    found = [(key, max(map(counters, rows), key=lambda values: values["ms"][0])) for key, rows in groups]
    if [key for key, _ in found] != [(impl, part) for _, impl, part in wanted]:
        raise ValueError(f"expected kernels of {wanted}, got {[key for key, _ in found]}")
    rows = []
    for (case, impl, part), (_, values) in zip(wanted, found, strict=True):
        pairs = getattr(attention_inputs, case)().visible_pairs
        flop = {"fwd": 4, "bwd": 10}[part] * pairs * DIM * HEADS
        values["tflops"] = (flop / values["ms"][0] / 1e9, "TFLOP/s")
        rows += [
            {"case": f"{case}_{part}", "impl": impl, "metric": metric, "value": value, "unit": unit}
            for metric, (value, unit) in values.items()
        ]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Profile, read and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=Path, help="a CSV of ncu (--page raw) instead of a new run")
    parser.add_argument("--raw", type=Path, help="keep ncu's CSV here")
    parser.add_argument("--out", help="results file; default: benchmarks/results/hopper_counters-<device>.json")
    parser.add_argument("--launch", action="store_true", help="only launch the kernels, for ncu")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    if options.launch:
        launch(JOBS)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = options.read or options.raw or Path(folder, "ncu.csv")
        if not options.read:
            profile(path)
        rows = records(path.read_text(), JOBS)
    for row in rows:
        print(row["case"], row["impl"], row["metric"], f"{row['value']:.4g}", row["unit"])
    command = command_line("bench_counters", [])
    print(write_records(options.out or "hopper_counters", rows, command=command, seed=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
