"""Trie attention with wide heads beside the portable kernels -> benchmarks/results/trie_attention_heads-<device>.json.

    python -m benchmarks.bench_heads            on a GPU; Inductor compiles flex for each pair of heads
    python -m benchmarks.bench_heads --impls triton,hopper

32 query and 8 key heads, bfloat16, one packed row; (D, Dv) of (192, 128), as in DeepSeek's latent attention, and of
(256, 256), as in Gemma. Medians of five runs, one implementation after the other. Results are compared with those of
the first implementation: max |difference| / max |its value|. What an implementation refuses is left out, and named with
the reason in `meta`.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch._functorch.config
from benchmarks.records import command_line, write_records
from benchmarks.timing import timed
from tests.support import attention_inputs

from tw_kernels import make_plan, trie_attention

DIMS = [(192, 128), (256, 256)]
TRIES = {"chain_16k": attention_inputs.chain_16k, "sft_32k": attention_inputs.sft_32k}
HEADS, KV_HEADS, ROUNDS = 32, 8, 5


def median_ms(call: Callable[[], Any]) -> float:
    """Device time of a call in milliseconds, after one that is not counted."""
    call()
    return median(timed(call).device_ms for _ in range(ROUNDS))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |difference| / max |wanted|."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def case(name: str, dim: int, value_dim: int, impls: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records of one trie and pair of head dimensions, and why implementations are not in them."""
    trie = TRIES[name]()
    torch.manual_seed(0)
    end = trie.subtree_end.cuda()

    def random(heads: int, columns: int) -> torch.Tensor:
        return torch.randn(trie.num_rows, heads, columns, device="cuda", dtype=torch.bfloat16)

    q, k, v = random(HEADS, dim), random(KV_HEADS, dim), random(KV_HEADS, value_dim)
    leaves, d_out = [x.requires_grad_() for x in (q, k, v)], random(HEADS, value_dim)
    plan, wanted = make_plan(end), None
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    label = f"{name}_{dim}_{value_dim}"
    pairs = trie.visible_pairs * HEADS
    flop = {"fwd": 2 * pairs * (dim + value_dim), "bwd": 2 * pairs * (3 * dim + 2 * value_dim)}
    for impl in impls:

        def forward(impl: str = impl) -> torch.Tensor:
            return trie_attention(q, k, v, end, impl=impl, plan=plan if impl in ("triton", "hopper") else None)

        try:
            out = forward()
            found = [out.detach(), *torch.autograd.grad(out, leaves, d_out, retain_graph=True)]
        except Exception as error:  # compilers of others raise what they like
            torch.cuda.empty_cache()
            refused[f"{label} {impl}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(label, impl, "FAILED", refused[f"{label} {impl}"], flush=True)
            continue

        def backward(out: torch.Tensor = out) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, leaves, d_out, retain_graph=True)

        wanted = wanted or found
        ms = {"fwd": median_ms(forward), "bwd": median_ms(backward)}
        values = {f"{part}_ms": (time, "ms") for part, time in ms.items()}
        values |= {f"{part}_tflops": (flop[part] / time / 1e9, "TFLOP/s") for part, time in ms.items()}
        apart = [difference(*pair) for pair in zip(found, wanted, strict=True)]
        values |= {"out_difference": (apart[0], "1"), "grad_difference": (max(apart[1:]), "1")}
        rows += [{"case": label, "impl": impl, "metric": m, "value": x, "unit": u} for m, (x, u) in values.items()]
        print(label, impl, {metric: f"{value:.4g}" for metric, (value, _) in values.items()}, flush=True)
    return rows, refused


def main(argv: list[str] | None = None) -> int:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impls", default="triton,hopper,flex")
    parser.add_argument("--out", help="results file; default: benchmarks/results/trie_attention_heads-<device>.json")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    torch._functorch.config.donated_buffer = False  # or compiled Flex refuses retain_graph, which repeats a backward
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    command = command_line("bench_heads", words)
    for name in TRIES:
        for dims in DIMS:
            more, why = case(name, *dims, options.impls.split(","))
            rows, refused = rows + more, refused | why
            notes = {"refused": refused} if refused else None
            path = write_records(
                options.out or "trie_attention_heads", rows, command=command, seed=0, device="cuda", notes=notes
            )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
