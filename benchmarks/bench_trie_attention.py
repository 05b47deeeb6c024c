"""Forward and backward of trie attention beside what a user would otherwise run.

    python -m benchmarks.bench_trie_attention                     the tables' tries on the GPU, about four minutes
    python -m benchmarks.bench_trie_attention --cases sft_32k --impls triton,flex --rounds 20
    python -m benchmarks.bench_trie_attention --cpu               small tries on the CPU

One process; all implementations of a case are prepared, warmed up and judged against exact values, then timed in
interleaved rounds with device events; medians are reported. A failing implementation is reported with its error and the
others go on. The JSON is written after every case, tables come last.

Metrics: fwd_ms, bwd_ms; fwd_tflops, bwd_tflops on the pairs visible in the trie (4 pairs D H, backward 2.5 times that;
for the expanded runs too: useful work); total_ms, wall time of planning + forward + backward on a trie not seen before;
plan_ms; peak_mib above the inputs; out_error, grad_error (max |difference| / max |exact|); fwd_vs_flex, bwd_vs_flex,
total_vs_flex, fwd_bwd_vs_expanded_cudnn (their time over ours); fwd_vs_cudnn_chain, bwd_vs_cudnn_chain (our rate over
cuDNN's on chain_16k); first_call_s (fresh process, empty caches); new_length_ms (a call at a new length less one at a
length seen before).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.attention_runs import RUNS, Inputs, Judge, Run, make_inputs, planners
from benchmarks.records import write_records
from tests.support import attention_inputs
from tests.support.attention_inputs import TrieShape

CASES = [
    *("chain_16k", "sft_32k", "grpo_linear_33k", "grpo_forkjoin_59k"),
    *("sft_3k", "short_64x1k", "chain_8k", "sft_64k", "chain_128k"),
]
CPU_CASES = ["tiny", "sft_800", "sft_3k"]
CPU_IMPLS = ["dense", "varlen", "reference", "expanded_sdpa"]
IMPLS = ["hopper", "hopper_deterministic", "triton", "triton_deterministic", "flex", "varlen"]
IMPLS += ["expanded_flash", "expanded_cudnn", "flex_dense_mask"]
PLANNED = ("hopper", "triton", "flex", "varlen")
# What is not worth its time or does not fit: (N, N) masks of long tries, the gathered copies of varlen at 128k.
SKIPPED = {
    "flex_dense_mask": {"grpo_forkjoin_59k", "short_64x1k", "sft_64k", "chain_128k", "chain_8k", "chain_16k", "sft_3k"},
    "hopper_deterministic": {"chain_8k", "sft_64k"},
    "triton_deterministic": {"chain_8k", "sft_64k"},
    "varlen": {"sft_64k"},
    "expanded_flash": {"sft_64k"},
    "expanded_cudnn": {"sft_64k"},
}
REPEATED_ROUND_SECONDS = 3.0  # device time that one implementation may spend on the rounds of one case


@dataclass
class Bench:
    """Options and everything measured so far."""

    args: argparse.Namespace
    device: str
    records: list[dict[str, object]] = field(default_factory=list)
    values: dict[tuple[str, str, str], float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    earlier: dict[str, Any] | None = None

    def add(self, case: str, impl: str, metric: str, value: float, unit: str) -> None:
        """Keep one figure."""
        self.records.append({"case": case, "impl": impl, "metric": metric, "value": value, "unit": unit})
        self.values[case, impl, metric] = value

    @contextmanager
    def guard(self, case: str, impl: str, step: str) -> Iterator[None]:
        """Report a failure and go on."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{case} {impl} {step}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            print(f"FAILED {self.failures[-1]}", flush=True)
            if self.args.verbose:
                traceback.print_exc()
            free_memory()

    def write(self) -> None:
        """Write everything measured so far."""
        if self.args.out:
            command = "python -m benchmarks.bench_trie_attention " + " ".join(sys.argv[1:])
            write_records(Path(self.args.out), self.records, command=command.strip(), seed=0, merge=self.earlier)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_ms(work: Callable[[], object]) -> float:
    """Milliseconds of `work` by device events; by the host clock without a GPU."""
    if not torch.cuda.is_available():
        return wall_ms(work)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def wall_ms(work: Callable[[], object]) -> float:
    """Milliseconds of `work` by the host clock, the device idle before and after."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def forward_backward(run: Run) -> tuple[float, float]:
    """One timed forward and one timed backward."""
    out: list[torch.Tensor] = []
    forward = device_ms(lambda: out.append(run.forward()))
    backward = device_ms(lambda: torch.autograd.grad(out[0], run.leaves, run.grad_out))
    return forward, backward


def peak_mib(run: Run) -> float:
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(run)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench_case(bench: Bench, trie: TrieShape, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Prepare, judge, then time all implementations of one case in interleaved rounds."""
    case = trie.name
    inputs = make_inputs(trie, bench.device, *heads, dtype)
    bench.add(case, "trie", "rows", trie.num_rows, "rows")
    bench.add(case, "trie", "visible_share", trie.visible_share, "1")
    bench.add(case, "trie", "sharing_ratio", trie.sharing_ratio, "1")
    bench.add(case, "trie", "flop_ratio", trie.pair_ratio, "1")
    judge = None
    with bench.guard(case, "judge", "exact values"):
        judge = Judge(inputs)
    free_memory()
    runs: dict[str, Run] = {}
    for impl in bench.args.impls:
        if case in SKIPPED.get(impl, ()) and not bench.args.all:
            continue
        with bench.guard(case, impl, "prepare and warm up"):
            run = RUNS[impl](inputs)
            for _ in range(2):
                forward_backward(run)
            if judge is not None:
                errors = judge.errors(run)
                bench.add(case, impl, "out_error", errors["out"], "1")
                bench.add(case, impl, "grad_error", max(errors[name] for name in ("dq", "dk", "dv")), "1")
            if torch.cuda.is_available():
                bench.add(case, impl, "peak_mib", peak_mib(run), "MiB")
            runs[impl] = run
    del judge
    free_memory()
    times: dict[str, list[tuple[float, float]]] = {impl: [] for impl in runs}
    for _ in range(bench.args.rounds):
        for impl, run in runs.items():
            if sum(f + b for f, b in times[impl]) > REPEATED_ROUND_SECONDS * 1e3:
                continue
            with bench.guard(case, impl, "round"):
                times[impl].append(forward_backward(run))
    for impl, pairs in times.items():
        if pairs:
            record_times(bench, inputs, case, impl, pairs)
    for impl in [impl for impl in runs if impl in PLANNED]:
        with bench.guard(case, impl, "plan and total"):
            bench_planning(bench, inputs, case, impl)


def record_times(bench: Bench, inputs: Inputs, case: str, impl: str, pairs: list[tuple[float, float]]) -> None:
    forward, backward = (median(times) for times in zip(*pairs, strict=True))
    bench.add(case, impl, "fwd_ms", forward, "ms")
    bench.add(case, impl, "bwd_ms", backward, "ms")
    bench.add(case, impl, "fwd_tflops", inputs.forward_flop / forward / 1e9, "TFLOP/s")
    bench.add(case, impl, "bwd_tflops", 2.5 * inputs.forward_flop / backward / 1e9, "TFLOP/s")


def bench_planning(bench: Bench, inputs: Inputs, case: str, impl: str) -> None:
    """Planning alone, and planning + forward + backward on a subtree_end tensor that is new each time."""
    plan = planners()[impl]
    rounds = max(3, min(bench.args.rounds, 7))
    bench.add(case, impl, "plan_ms", median(wall_ms(lambda: plan(inputs.end.clone())) for _ in range(rounds)), "ms")

    def whole() -> None:
        fresh = Inputs(inputs.trie, inputs.q, inputs.k, inputs.v, inputs.grad_out, inputs.end.clone())
        run = RUNS[impl](fresh)
        torch.autograd.grad(run.forward(), run.leaves, run.grad_out)

    whole()
    bench.add(case, impl, "total_ms", median(wall_ms(whole) for _ in range(rounds)), "ms")


def bench_new_lengths(bench: Bench, impl: str, heads: tuple[int, int, int], dtype: torch.dtype, base: int) -> None:
    """Wall time of plan + forward + backward at lengths never seen, less the same work at a length seen before."""

    def once(length: int) -> float:
        trie = attention_inputs.star(length // 2, [length // 4, length // 8, length - length // 2 - length // 4])
        inputs = make_inputs(trie, bench.device, *heads, dtype)

        def work() -> None:
            run = RUNS[impl](inputs)
            torch.autograd.grad(run.forward(), run.leaves, run.grad_out)

        return wall_ms(work)

    for length in (base, base + 1, base + 2, base):
        once(length)
    fresh, again = [], []
    for i in range(12):
        fresh.append(once(base + 3 + 5 * i))
        again.append(once(base + 3 + 5 * i))
    bench.add("new_length", impl, "new_length_ms", median(fresh) - median(again), "ms")
    bench.add("new_length", impl, "repeated_length_ms", median(again), "ms")


def bench_first_calls(bench: Bench) -> None:
    """Seconds from the first call to its gradients, compilation included, in a fresh process with empty caches."""
    for impl in [impl for impl in ("triton", "flex") if impl in bench.args.impls]:
        with bench.guard("first_call", impl, "fresh process"), tempfile.TemporaryDirectory() as cache:
            caches = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
            command = [sys.executable, "-m", "benchmarks.bench_trie_attention", "--first-call", impl]
            command += ["--cpu"] * bench.args.cpu
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, timeout=150)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            bench.add("first_call", impl, "first_call_s", float(done.stdout.strip().splitlines()[-1]), "s")


def first_call(impl: str, device: str, heads: tuple[int, int, int], dtype: torch.dtype, case: str) -> float:
    """The fresh process of `bench_first_calls`."""
    inputs = make_inputs(getattr(attention_inputs, case)(), device, *heads, dtype)
    synchronize()
    start = time.perf_counter()
    run = RUNS[impl](inputs)
    torch.autograd.grad(run.forward(), run.leaves, run.grad_out)
    synchronize()
    return time.perf_counter() - start


def add_ratios(bench: Bench) -> None:
    """Ratios of what was measured."""
    value = bench.values.get
    cases = list(dict.fromkeys(case for case, _, metric in bench.values if metric == "fwd_ms"))
    for case in cases:
        for impl in bench.args.impls:
            ours = {m: value((case, impl, m)) for m in ("fwd_ms", "bwd_ms", "total_ms", "fwd_tflops", "bwd_tflops")}
            for metric in ("fwd", "bwd", "total"):
                theirs, mine = value((case, "flex", f"{metric}_ms")), ours[f"{metric}_ms"]
                if theirs and mine and impl != "flex":
                    bench.add(case, impl, f"{metric}_vs_flex", theirs / mine, "1")
            for metric in ("fwd", "bwd"):
                rate, mine = value(("chain_16k", "expanded_cudnn", f"{metric}_tflops")), ours[f"{metric}_tflops"]
                if rate and mine:
                    bench.add(case, impl, f"{metric}_vs_cudnn_chain", mine / rate, "1")
            theirs = [value((case, "expanded_cudnn", m)) for m in ("fwd_ms", "bwd_ms")]
            if all(theirs) and ours["fwd_ms"] and ours["bwd_ms"] and impl != "expanded_cudnn":
                ratio = sum(theirs) / (ours["fwd_ms"] + ours["bwd_ms"])
                bench.add(case, impl, "fwd_bwd_vs_expanded_cudnn", ratio, "1")


def print_tables(bench: Bench) -> None:
    cases = list(dict.fromkeys(case for case, _, metric in bench.values if metric == "fwd_ms"))
    impls = [impl for impl in bench.args.impls if any((case, impl, "fwd_ms") in bench.values for case in cases)]

    def cell(case: str, impl: str, metrics: tuple[str, ...], digits: int) -> str:
        found = [bench.values.get((case, impl, m)) for m in metrics]
        return ", ".join("-" if x is None else f"{x:.{digits}f}" for x in found) if any(found) else ""

    tables: list[tuple[str, tuple[str, ...], int]] = [
        ("fwd, bwd ms", ("fwd_ms", "bwd_ms"), 2),
        ("fwd, bwd TFLOP/s", ("fwd_tflops", "bwd_tflops"), 0),
        ("flex / ours: fwd, bwd, total with planning", ("fwd_vs_flex", "bwd_vs_flex", "total_vs_flex"), 2),
        ("expanded cuDNN / ours, fwd + bwd", ("fwd_bwd_vs_expanded_cudnn",), 2),
        ("plan, total ms", ("plan_ms", "total_ms"), 2),
        ("out, grad error", ("out_error", "grad_error"), 5),
        ("peak MiB", ("peak_mib",), 0),
    ]
    for title, metrics, digits in tables:
        print(f"\n{title}\n" + " | ".join(["case".ljust(18), *(impl.ljust(20) for impl in impls)]))
        for case in cases:
            cells = [cell(case, impl, metrics, digits).ljust(20) for impl in impls]
            print(" | ".join([case.ljust(18), *cells]))
    for (case, impl, metric), value in bench.values.items():
        if metric in ("first_call_s", "new_length_ms", "repeated_length_ms"):
            print(f"{case} {impl} {metric} {value:.3f}")
    for failure in bench.failures:
        print(f"FAILED {failure}")


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="comma-separated; default: all of CASES")
    parser.add_argument("--impls", default="", help=f"comma-separated, of {', '.join(RUNS)}; default: all of IMPLS")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument(
        "--out", default="", help="results file; default: benchmarks/results/trie_attention-<device>.json"
    )
    parser.add_argument("--merge", default="", help="results file to add to: other (case, impl) pairs of it are kept")
    parser.add_argument("--all", action="store_true", help="also what SKIPPED leaves out")
    parser.add_argument("--cpu", action="store_true", help="small tries on the CPU, float32, fewer heads")
    parser.add_argument("--no-first-call", action="store_true", help="leave out the fresh processes")
    parser.add_argument("--cases-only", action="store_true", help="leave out new lengths and the fresh processes")
    parser.add_argument("--first-call", default="", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="print whole tracebacks")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device was found; use --cpu for small tries on the CPU")
    device = "cpu" if args.cpu else "cuda"
    heads, dtype = ((8, 4, 64), torch.float32) if args.cpu else ((32, 8, 128), torch.bfloat16)
    if args.first_call:
        print(first_call(args.first_call, device, heads, dtype, "tiny" if args.cpu else "sft_32k"))
        return 0
    args.impls = args.impls.split(",") if args.impls else CPU_IMPLS if args.cpu else IMPLS
    cases = args.cases.split(",") if args.cases else CPU_CASES if args.cpu else CASES
    if not args.out:
        name = "cpu" if args.cpu else torch.cuda.get_device_name().lower().replace("nvidia", "").split()[0]
        args.out = f"benchmarks/results/trie_attention-{name}.json"
    bench = Bench(args, device)
    if args.merge:
        bench.earlier = json.loads(Path(args.merge).read_text())
    started = time.perf_counter()
    for case in cases:
        with bench.guard(case, "all", "case"):
            bench_case(bench, getattr(attention_inputs, case)(), heads, dtype)
        free_memory()
        bench.write()
        print(f"{case} done after {time.perf_counter() - started:.0f} s", flush=True)
    for impl in [impl for impl in ("triton", "flex") if impl in args.impls and not args.cases_only]:
        with bench.guard("new_length", impl, "new lengths"):
            bench_new_lengths(bench, impl, heads, dtype, 40 if args.cpu else 3000)
    if not args.no_first_call and not args.cases_only:
        bench_first_calls(bench)
    add_ratios(bench)
    bench.write()
    print_tables(bench)
    print(json.dumps({"seconds": round(time.perf_counter() - started), "failures": len(bench.failures)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
