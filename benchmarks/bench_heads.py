"""Trie attention with wide heads beside the portable kernels -> benchmarks/results/trie_attention_heads-<device>.json.

    python -m benchmarks.bench_heads            on a GPU; Inductor compiles flex for each pair of heads
    python -m benchmarks.bench_heads --impls triton,hopper

32 query and 8 key heads, bfloat16, one packed row; (D, Dv) of (192, 128), as in DeepSeek's latent attention, and of
(256, 256), as in Gemma. All implementations of a case are warmed up and judged, then timed in interleaved rounds;
medians of five. out_error, grad_error: max |difference| / max |exact|, exact values in float32 on sampled rows (`Judge`
of attention_runs.py). `meta` names what an implementation refused, with the reason ("refused"), and where the device
may have waited for launches ("device_waited").
"""

import argparse
import sys
from statistics import median
from typing import Any

import torch
from benchmarks.attention_runs import Inputs, Judge
from benchmarks.records import command_line, write_records
from benchmarks.timing import Timing, free_memory, timed
from tests.support import attention_inputs
from torch import Tensor
from torch.nn.functional import pad

from tw_kernels import BlockPlan, make_plan, trie_attention

DIMS = [(192, 128), (256, 256)]
TRIES = {"chain_16k": attention_inputs.chain_16k, "sft_32k": attention_inputs.sft_32k}
HEADS, KV_HEADS, ROUNDS = 32, 8, 5


class Case:
    """Inputs of one trie and pair of head dimensions, and the exact values on sampled rows."""

    def __init__(self, name: str, dim: int, value_dim: int, device: str = "cuda") -> None:
        trie = TRIES[name]()
        torch.manual_seed(0)

        def random(heads: int, columns: int) -> Tensor:
            return torch.randn(trie.num_rows, heads, columns, device=device, dtype=torch.bfloat16)

        self.label = f"{name}_{dim}_{value_dim}"
        self.end = trie.subtree_end.to(device)
        self.plan: BlockPlan = make_plan(self.end)
        self.leaves = [
            x.requires_grad_() for x in (random(HEADS, dim), random(KV_HEADS, dim), random(KV_HEADS, value_dim))
        ]
        self.d_out = random(HEADS, value_dim)
        pairs = trie.visible_pairs * HEADS
        self.flop = {"fwd": 2 * pairs * (dim + value_dim), "bwd": 2 * pairs * (3 * dim + 2 * value_dim)}
        # The judge knows one head dimension: columns of zeros in v and d_out change nothing else.
        q, k, v = (x.detach() for x in self.leaves)
        v, d_out = (pad(x, (0, dim - value_dim)) for x in (v, self.d_out))
        judge = Judge(Inputs(trie, q, k, v, d_out, self.end))
        self.rows, self.exact = judge.rows, judge.exact

    def forward(self, impl: str) -> Tensor:
        """The output of one implementation. Shape (N, H, Dv)."""
        q, k, v = self.leaves
        return trie_attention(q, k, v, self.end, impl=impl, plan=self.plan if impl in ("triton", "hopper") else None)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """dq, dk and dv from an output, whose graph is spent."""
        return torch.autograd.grad(out, self.leaves, self.d_out)

    def timed(self, impl: str) -> tuple[Timing, Timing]:
        """One timed forward and one timed backward."""
        outs: list[Tensor] = []
        return timed(lambda: outs.append(self.forward(impl))), timed(lambda: self.backward(outs[0]))

    def errors(self, impl: str) -> tuple[float, float]:
        """Of the output, and the largest of the gradients."""
        out = self.forward(impl)
        found = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *self.backward(out)), strict=True))
        error = {}
        for name, value in found.items():
            exact = self.exact[name][..., : value.shape[-1]]
            error[name] = float((value[self.rows].float() - exact).abs().max() / exact.abs().max())
        return error.pop("out"), max(error.values())


def measure(case: Case, impls: list[str]) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Records of one case, why implementations are not in them, and where the device may have waited."""
    errors: dict[str, tuple[float, float]] = {}
    refused: dict[str, str] = {}
    for impl in impls:
        try:
            errors[impl] = case.errors(impl)
            case.timed(impl)
        except Exception as error:  # compilers of others raise what they like
            errors.pop(impl, None)
            refused[f"{case.label} {impl}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(case.label, impl, "FAILED", refused[f"{case.label} {impl}"], flush=True)
        free_memory()
    times: dict[str, list[tuple[Timing, Timing]]] = {impl: [] for impl in errors}
    for _ in range(ROUNDS):
        for impl, pairs in times.items():
            pairs.append(case.timed(impl))
    rows: list[dict[str, Any]] = []
    waited: list[str] = []
    for impl, pairs in times.items():
        values = {"out_error": (errors[impl][0], "1"), "grad_error": (errors[impl][1], "1")}
        for part, timings in zip(("fwd", "bwd"), zip(*pairs, strict=True), strict=True):
            ms = median(timing.device_ms for timing in timings)
            values |= {f"{part}_ms": (ms, "ms"), f"{part}_tflops": (case.flop[part] / ms / 1e9, "TFLOP/s")}
            waited += [f"{case.label} {impl} {part}"] * any(timing.waited for timing in timings)
        rows += [{"case": case.label, "impl": impl, "metric": m, "value": x, "unit": u} for m, (x, u) in values.items()]
        print(case.label, impl, {metric: f"{value:.4g}" for metric, (value, _) in values.items()}, flush=True)
    return rows, refused, waited


def main(argv: list[str] | None = None) -> int:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impls", default="triton,hopper,flex")
    parser.add_argument("--out", help="results file; default: benchmarks/results/trie_attention_heads-<device>.json")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    waited: list[str] = []
    command = command_line("bench_heads", words)
    for name in TRIES:
        for dims in DIMS:
            more, why, late = measure(Case(name, *dims), options.impls.split(","))
            free_memory()
            rows, refused, waited = rows + more, refused | why, waited + late
            notes = {key: value for key, value in (("refused", refused), ("device_waited", waited)) if value}
            path = write_records(
                options.out or "trie_attention_heads", rows, command=command, seed=0, device="cuda", notes=notes or None
            )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
