"""Forward and backward of trie attention beside what a user would otherwise run.

    python -m benchmarks.bench_trie_attention                     the tables' tries on the GPU
    python -m benchmarks.bench_trie_attention --cases sft_32k --impls triton,flex --rounds 20
    python -m benchmarks.bench_trie_attention --parts first_call --merge FILE --out FILE
    python -m benchmarks.bench_trie_attention --cpu               small tries on the CPU

One process; all implementations of a case are prepared, warmed up and judged against exact values, then timed in
interleaved rounds with device events, behind work that keeps the device busy while the host launches (what launching
takes is a figure of its own); medians are reported. A failing implementation is reported with its error and the
others go on. The JSON, ratios included, is written after every case; tables come last.

Metrics: fwd_ms, bwd_ms; fwd_host_ms, bwd_host_ms until the call returned to the host; fwd_tflops, bwd_tflops on the
pairs visible in the trie (4 pairs D H, backward 2.5 times that; for the expanded runs too: useful work; for the equal
chain on its own); total_ms, wall time of planning + forward + backward on a trie not seen before, on an idle device;
plan_ms; peak_mib above the inputs; out_error, grad_error (max |difference| / max |exact|); fwd_vs_flex, bwd_vs_flex,
total_vs_flex, fwd_bwd_vs_expanded_cudnn (their time over ours); fwd_vs_equal_chain, bwd_vs_equal_chain (our rate over
cuDNN's on a causal chain of equal FLOPs); first_call_s (fresh process, empty caches); new_length_ms (a call at a new
length less one at a length seen before). A ratio whose sides were measured by two runs is named in meta's
"ratios_across_runs".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.attention_runs import RUNS, Inputs, Judge, Run, make_inputs, planners
from benchmarks.records import command_line, device_slug, merge_records, read_results, write_records
from benchmarks.timing import Timing, free_memory, synchronize, timed, wall_ms
from tests.support import attention_inputs
from tests.support.attention_inputs import TrieShape

CASES = [
    *("chain_16k", "sft_32k", "grpo_linear_33k", "grpo_forkjoin_59k"),
    *("sft_3k", "short_64x1k", "chain_8k", "sft_64k", "chain_128k"),
]
CPU_CASES = ["tiny", "sft_800", "sft_3k"]
CPU_IMPLS = ["dense", "varlen", "reference", "expanded_sdpa", "sdpa_equal_chain"]
IMPLS = ["hopper", "hopper_deterministic", "triton", "triton_deterministic", "flex", "varlen"]
IMPLS += ["expanded_flash", "expanded_cudnn", "cudnn_equal_chain", "flex_dense_mask"]
PLANNED = ("hopper", "triton", "flex", "varlen")
COMPILED = ("hopper", "triton", "flex")
PARTS = ["cases", "new_length", "first_call"]
# What is not worth its time or does not run: compiled FlexAttention reads beyond an (N, N) mask of more than 2**31
# entries ("an illegal memory access", 46,341 rows and more), which ends the process.
SKIPPED = {
    "flex_dense_mask": {"chain_128k", "grpo_forkjoin_59k", "sft_64k", "short_64x1k"},
    "hopper_deterministic": {"chain_8k", "sft_64k"},
    "triton_deterministic": {"chain_8k", "sft_64k"},
}
REPEATED_ROUND_SECONDS = 3.0  # device time that one implementation may spend on the rounds of one case


@dataclass
class Bench:
    """Options and everything measured so far."""

    args: argparse.Namespace
    device: str
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    earlier: dict[str, Any] | None = None

    def add(self, case: str, impl: str, metric: str, value: float, unit: str) -> None:
        """Keep one figure."""
        self.records.append({"case": case, "impl": impl, "metric": metric, "value": value, "unit": unit})

    @contextmanager
    def guard(self, case: str, impl: str, step: str) -> Iterator[None]:
        """Report a failure and go on."""
        try:
            yield
        except Exception as error:
            message = next(iter(str(error).splitlines()), "")[:300]
            self.failures.append(f"{case} {impl} {step}: {type(error).__name__}: {message}")
            print(f"FAILED {self.failures[-1]}", flush=True)
            if self.args.verbose:
                traceback.print_exc()
            free_memory()

    def write(self) -> list[dict[str, Any]]:
        """Write everything measured so far, earlier results and ratios included; returns the records."""
        if not self.records:
            return []
        rows = merge_records(self.earlier, self.records)
        added, across = ratios(rows, {(row["case"], row["impl"]) for row in self.records})
        rows += added
        command = command_line("bench_trie_attention", sys.argv[1:])
        notes = {"ratios_across_runs": across} if across else None
        write_records(
            Path(self.args.out),
            rows,
            command=command,
            seed=0,
            device=self.device,
            merge=self.earlier,
            notes=notes,
        )
        return rows


def forward_backward(run: Run) -> tuple[Timing, Timing]:
    """One timed forward and one timed backward."""
    out: list[torch.Tensor] = []
    forward = timed(lambda: out.append(run.forward()))
    backward = timed(lambda: torch.autograd.grad(out[0], run.leaves, run.grad_out))
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
    checked: dict[str, list[tuple[str, float, str]]] = {}
    for impl in bench.args.impls:
        if case in SKIPPED.get(impl, ()) and not bench.args.all:
            continue
        with bench.guard(case, impl, "prepare and warm up"):
            run = RUNS[impl](inputs)
            for _ in range(2):
                forward_backward(run)
            figures: list[tuple[str, float, str]] = []
            if judge is not None and run.forward_flop is None:
                errors = judge.errors(run)
                figures.append(("out_error", errors["out"], "1"))
                figures.append(("grad_error", max(errors[name] for name in ("dq", "dk", "dv")), "1"))
            if torch.cuda.is_available():
                figures.append(("peak_mib", peak_mib(run), "MiB"))
            runs[impl], checked[impl] = run, figures
    del judge
    free_memory()
    times: dict[str, list[tuple[Timing, Timing]]] = {impl: [] for impl in runs}
    for _ in range(bench.args.rounds):
        for impl, run in runs.items():
            if sum(f.device_ms + b.device_ms for f, b in times[impl]) > REPEATED_ROUND_SECONDS * 1e3:
                continue
            with bench.guard(case, impl, "round"):
                times[impl].append(forward_backward(run))
    for impl, pairs in times.items():
        if pairs:
            for figure in checked[impl]:
                bench.add(case, impl, *figure)
            record_times(bench, case, impl, runs[impl].forward_flop or inputs.forward_flop, pairs)
    bench_planning(bench, inputs, [impl for impl in runs if impl in PLANNED])


def record_times(bench: Bench, case: str, impl: str, flop: float, pairs: list[tuple[Timing, Timing]]) -> None:
    for name, work, timings in zip(("fwd", "bwd"), (flop, 2.5 * flop), zip(*pairs, strict=True), strict=True):
        ms = median(timing.device_ms for timing in timings)
        bench.add(case, impl, f"{name}_ms", ms, "ms")
        bench.add(case, impl, f"{name}_host_ms", median(timing.host_ms for timing in timings), "ms")
        bench.add(case, impl, f"{name}_tflops", work / ms / 1e9, "TFLOP/s")


def bench_planning(bench: Bench, inputs: Inputs, impls: list[str]) -> None:
    """Planning alone; then planning + forward + backward on a new subtree_end tensor, in interleaved rounds."""
    case = inputs.trie.name
    rounds = max(3, min(bench.args.rounds, 7))

    def plan(impl: str) -> None:
        planners()[impl](inputs.end.clone())

    def whole(impl: str) -> None:
        run = RUNS[impl](replace(inputs, end=inputs.end.clone()))
        torch.autograd.grad(run.forward(), run.leaves, run.grad_out)

    totals: dict[str, list[float]] = {}
    for impl in impls:
        with bench.guard(case, impl, "plan"):
            bench.add(case, impl, "plan_ms", median(wall_ms(partial(plan, impl)) for _ in range(rounds)), "ms")
            whole(impl)
            totals[impl] = []
    for _ in range(rounds):
        for impl, times in totals.items():
            if sum(times) > REPEATED_ROUND_SECONDS * 1e3:
                continue
            with bench.guard(case, impl, "total"):
                times.append(wall_ms(partial(whole, impl)))
    for impl, times in totals.items():
        if times:
            bench.add(case, impl, "total_ms", median(times), "ms")


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
    for impl in [impl for impl in COMPILED if impl in bench.args.impls]:
        with bench.guard("first_call", impl, "fresh process"), tempfile.TemporaryDirectory() as cache:
            caches = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
            command = [sys.executable, "-m", "benchmarks.bench_trie_attention", "--first-call", impl]
            command += ["--cpu"] * bench.args.cpu
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, timeout=150)
            if done.returncode:
                raise RuntimeError(next(reversed(done.stderr.strip().splitlines()), f"status {done.returncode}"))
            bench.add("first_call", impl, "first_call_s", float(done.stdout.strip().splitlines()[-1]), "s")
        bench.write()


def first_call(impl: str, device: str, heads: tuple[int, int, int], dtype: torch.dtype, case: str) -> float:
    """The fresh process of `bench_first_calls`."""
    inputs = make_inputs(getattr(attention_inputs, case)(), device, *heads, dtype)
    synchronize()
    start = time.perf_counter()
    run = RUNS[impl](inputs)
    torch.autograd.grad(run.forward(), run.leaves, run.grad_out)
    synchronize()
    return time.perf_counter() - start


def ratios(records: list[dict[str, Any]], own: set[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Ratios that `records` lack, and the names of those with one side alone among the pairs `own` of this run.

    A ratio that stands among the records stays as its own run gave it, from the same rounds wherever that run could.
    """
    value = {(row["case"], row["impl"], row["metric"]): row["value"] for row in records}
    for case, impl in [(case, impl) for case, impl, metric in value if metric == "fwd_ms"]:
        value[case, impl, "fwd_bwd_ms"] = value[case, impl, "fwd_ms"] + value[case, impl, "bwd_ms"]
    sides = [(f"{part}_vs_flex", "flex", f"{part}_ms") for part in ("fwd", "bwd", "total")]
    sides += [("fwd_bwd_vs_expanded_cudnn", "expanded_cudnn", "fwd_bwd_ms")]
    sides += [(f"{part}_vs_equal_chain", "cudnn_equal_chain", f"{part}_tflops") for part in ("fwd", "bwd")]
    added, across = [], []
    for case, impl, measured in list(value):
        for metric, other, of in sides:
            theirs = value.get((case, other, of))
            apart = impl == other or impl.endswith("equal_chain") or (case, impl, metric) in value
            if measured != of or theirs is None or apart:
                continue
            ours = value[case, impl, of]
            ratio = ours / theirs if of.endswith("_tflops") else theirs / ours
            added.append({"case": case, "impl": impl, "metric": metric, "value": ratio, "unit": "1"})
            if ((case, impl) in own) != ((case, other) in own):
                across.append(f"{case} {impl} {metric}")
    return added, across


def print_tables(bench: Bench, records: list[dict[str, Any]]) -> None:
    """What this run measured, from the records of its results file."""
    own = {(row["case"], row["impl"]) for row in bench.records}
    values = {(r["case"], r["impl"], r["metric"]): r["value"] for r in records if (r["case"], r["impl"]) in own}
    cases = list(dict.fromkeys(case for case, _, metric in values if metric == "fwd_ms"))
    impls = [impl for impl in bench.args.impls if any((case, impl, "fwd_ms") in values for case in cases)]

    def cell(case: str, impl: str, metrics: tuple[str, ...], digits: int) -> str:
        found = [values.get((case, impl, m)) for m in metrics]
        return ", ".join("-" if x is None else f"{x:.{digits}f}" for x in found) if any(found) else ""

    tables: list[tuple[str, tuple[str, ...], int]] = [
        ("fwd, bwd ms", ("fwd_ms", "bwd_ms"), 2),
        ("fwd, bwd TFLOP/s", ("fwd_tflops", "bwd_tflops"), 0),
        ("flex / ours: fwd, bwd, total with planning", ("fwd_vs_flex", "bwd_vs_flex", "total_vs_flex"), 2),
        ("expanded cuDNN / ours, fwd + bwd", ("fwd_bwd_vs_expanded_cudnn",), 2),
        ("our rate / cuDNN's on an equal chain", ("fwd_vs_equal_chain", "bwd_vs_equal_chain"), 2),
        ("plan, total ms", ("plan_ms", "total_ms"), 2),
        ("out, grad error", ("out_error", "grad_error"), 5),
        ("peak MiB", ("peak_mib",), 0),
    ]
    for title, metrics, digits in tables:
        print(f"\n{title}\n" + " | ".join(["case".ljust(18), *(impl.ljust(20) for impl in impls)]))
        for case in cases:
            cells = [cell(case, impl, metrics, digits).ljust(20) for impl in impls]
            print(" | ".join([case.ljust(18), *cells]))
    for (case, impl, metric), value in values.items():
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
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; first_call: fresh processes")
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
    parts, cases = args.parts.split(","), args.cases.split(",") if args.cases else CPU_CASES if args.cpu else CASES
    if unknown := {*parts} - {*PARTS} or {*args.impls} - {*RUNS}:
        parser.error(f"unknown {', '.join(sorted(unknown))}; --parts are {', '.join(PARTS)}, --impls {', '.join(RUNS)}")
    args.out = args.out or f"benchmarks/results/trie_attention-{device_slug(device)}.json"
    bench = Bench(args, device, earlier=read_results(args.merge))
    # The mask of flex_dense_mask is a new closure for every case: more compilations of one function than torch expects.
    torch._dynamo.config.recompile_limit = 64
    started = time.perf_counter()
    for case in cases if "cases" in parts else ():
        with bench.guard(case, "all", "case"):
            bench_case(bench, getattr(attention_inputs, case)(), heads, dtype)
        free_memory()
        bench.write()
        print(f"{case} done after {time.perf_counter() - started:.0f} s", flush=True)
    for impl in [impl for impl in COMPILED if impl in args.impls and "new_length" in parts]:
        with bench.guard("new_length", impl, "new lengths"):
            bench_new_lengths(bench, impl, heads, dtype, 40 if args.cpu else 3000)
        bench.write()
    if "first_call" in parts:
        bench_first_calls(bench)
    print_tables(bench, bench.write())
    print(json.dumps({"seconds": round(time.perf_counter() - started), "failures": len(bench.failures)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
