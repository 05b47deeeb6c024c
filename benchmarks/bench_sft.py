"""A training step on packed tries beside one on expanded sequences: loss curves, time, memory, sharing efficiency.

    python -m benchmarks.bench_sft --out DIR          Qwen3-0.6B and 4B shapes, random weights, bfloat16, one GPU
    python -m benchmarks.bench_sft --tiny --out DIR   the same code on a CPU (its test)

Both runs start from the same weights and take the same fork/join samples in the same order, one sample a step, with
activation checkpointing, TRL's fused head and AdamW. "trie": one packed row through impl="triton". "expanded": its
units one after another, padding-free, through varlen flash attention, in as few rows as fit `--row-budget`. Each run is
warmed up on the first sample before its clock starts; step_ms is the median over the steps.

flop_ratio counts the linear layers by tokens and attention by visible pairs, expanded over trie; the head runs on
trained tokens alone and costs both the same. sharing_efficiency = (expanded step_ms / trie step_ms) / flop_ratio.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks.records import device_slug, write_records
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tw_core import PackedTrie, ReasoningTrie, Unit
from tw_recipes.attention import install, uninstall
from tw_recipes.sft.collator import TrieCollator, packed_columns


class Case(NamedTuple):
    """One model shape and how long it is run."""

    config: dict[str, Any]
    steps: int
    learning_rate: float
    scale: float  # of the lengths of a sample


_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
CASES = {
    "qwen3_0.6b": Case(
        {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        steps=50,
        learning_rate=2e-4,
        scale=0.75,
    ),
    "qwen3_4b": Case(
        {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        steps=4,
        learning_rate=5e-5,
        scale=1.0,
    ),
}
TINY = Case(
    {
        **_QWEN3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "head_dim": 8,
        "vocab_size": 512,
    },
    steps=4,
    learning_rate=1e-3,
    scale=0.02,
)


def sample_units(rng: np.random.Generator, vocab: int, scale: float) -> list[Unit]:
    """Units of one fork/join trajectory: 3 to 4 blocks of 2 to 5 threads; tokens from a skewed distribution."""

    def tokens(mean: float) -> list[int]:
        count = max(2, int(scale * mean * rng.uniform(0.6, 1.4)))
        return (rng.zipf(1.3, count) % (vocab // 64)).tolist()

    context, units = tokens(300), []
    for _ in range(rng.integers(3, 5)):
        opening = tokens(500)
        units.append(Unit(context, opening))
        context = context + opening
        bodies = [(tokens(8), tokens(600)) for _ in range(rng.integers(2, 6))]
        units += [Unit(context + header, body) for header, body in bodies]
        context = context + [token for header, body in bodies for token in header + body]
    units.append(Unit(context, tokens(700)))
    return units


def expanded_batches(units: list[Unit], row_budget: int) -> list[dict[str, Any]]:
    """The units as chains, padding-free, in rows of at most `row_budget` tokens."""
    bins: list[list[PackedTrie]] = [[]]
    for unit in units:
        chain = ReasoningTrie.from_units([unit]).pack()
        if bins[-1] and sum(part.num_rows for part in bins[-1]) + chain.num_rows > row_budget:
            bins.append([])
        bins[-1].append(chain)
    return [TrieCollator()([packed_columns(PackedTrie.concat(parts))]) for parts in bins]


def forward_flops(config: dict[str, Any], depth_sum: int, rows: int) -> float:
    """Forward FLOPs of the layers: linear by rows, attention by visible pairs (`depth_sum`)."""
    hidden, heads, dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    weights = hidden * dim * (2 * heads + 2 * config["num_key_value_heads"]) + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * (2.0 * weights * rows + 4.0 * heads * dim * depth_sum)


def build(case: Case, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The model with random weights, the same for each call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**case.config, max_position_embeddings=65536)).to(dtype)
    add_fused_lm_head(model, outputs=("log_probs",))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def train(
    model: Qwen3ForCausalLM, steps: list[list[dict[str, Any]]], learning_rate: float, device: torch.device
) -> tuple[list[float], list[float]]:
    """Loss (mean over trained tokens) and seconds of each step; a step is a list of micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=device.type == "cuda")

    def step(batches: list[dict[str, Any]]) -> float:
        count = sum(batch["labels"].numel() for batch in batches)
        total = torch.zeros((), device=device)
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = -model(**on_device, fused_lm_head=True).log_probs.sum() / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return float(total)

    step(steps[0])  # compile and allocate; its gradients are dropped
    optimizer.zero_grad()
    losses, seconds = [], []
    for batches in steps:
        start = time.perf_counter()
        losses.append(step(batches))
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def run_case(name: str, case: Case, impls: dict[str, str], device: torch.device, row_budget: int) -> list[dict]:
    """All records of one model."""
    rng = np.random.default_rng(0)
    samples = [sample_units(rng, case.config["vocab_size"], case.scale) for _ in range(case.steps)]
    packed = [ReasoningTrie.from_units(units).pack() for units in samples]
    batches = {
        "trie": [[TrieCollator()([packed_columns(trie)])] for trie in packed],
        "expanded": [expanded_batches(units, row_budget) for units in samples],
    }
    flops = {
        impl: sum(
            forward_flops(case.config, int((batch["position_ids"] + 1).sum()), batch["input_ids"].numel())
            for step in steps
            for batch in step
        )
        for impl, steps in batches.items()
    }
    records: list[dict[str, Any]] = []

    def record(impl: str, metric: str, value: float, unit: str) -> None:
        records.append({"case": name, "impl": impl, "metric": metric, "value": round(float(value), 6), "unit": unit})
        if not metric.startswith("loss_step"):
            print(f"{name} {impl} {metric} {value:.5g} {unit}", flush=True)

    step_seconds = {}
    for impl, steps in batches.items():
        model = build(case, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        install(model, impl=impls[impl])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses, seconds = train(model, steps, case.learning_rate, device)
        uninstall(model)
        del model
        step_seconds[impl] = median(seconds)
        rows = sum(batch["input_ids"].numel() for step in steps for batch in step)
        record(impl, "step_ms", 1e3 * step_seconds[impl], "ms")
        record(impl, "rows_per_step", rows / len(steps), "rows")
        record(impl, "logical_tokens_per_s", sum(t.num_expanded_tokens for t in packed) / sum(seconds), "tokens/s")
        if device.type == "cuda":
            record(impl, "peak_mib", torch.cuda.max_memory_allocated() / 2**20, "MiB")
            torch.cuda.empty_cache()
        for step, loss in enumerate(losses):
            record(impl, f"loss_step_{step:03d}", loss, "nats")
    losses = {impl: loss_curve(records, name, impl) for impl in batches}
    speedup, flop_ratio = step_seconds["expanded"] / step_seconds["trie"], flops["expanded"] / flops["trie"]
    record("trie", "sharing_ratio", sum(t.num_expanded_tokens for t in packed) / sum(t.num_tokens for t in packed), "")
    record("trie", "flop_ratio", flop_ratio, "")
    record("trie", "speedup", speedup, "")
    record("trie", "sharing_efficiency", speedup / flop_ratio, "")
    record("trie", "loss_max_relative_difference", np.max(np.abs(losses["trie"] / losses["expanded"] - 1)), "")
    return records


def loss_curve(records: list[dict], case: str, impl: str) -> np.ndarray:
    """Loss of each step, shape (steps,)."""
    steps = [r for r in records if r["case"] == case and r["impl"] == impl and r["metric"].startswith("loss_step")]
    return np.array([r["value"] for r in steps])


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Loss curves of both runs, one panel a model, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(record["case"] for record in records))
    figure, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 5), squeeze=False, height_ratios=(3, 1))
    for column, name in enumerate(names):
        curves = {impl: loss_curve(records, name, impl) for impl in ("trie", "expanded")}
        for impl, style in (("expanded", "-"), ("trie", "--")):
            axes[0][column].plot(curves[impl], style, label=impl)
        axes[0][column].set(title=name, ylabel="loss (nats per token)")
        axes[0][column].legend()
        axes[1][column].plot(100 * (curves["trie"] / curves["expanded"] - 1), color="gray")
        axes[1][column].axhline(0, color="black", linewidth=0.5)
        axes[1][column].set(xlabel="step", ylabel="difference (%)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> int:
    """Run the cases, write DIR/sft-<device>.json after each, and plot the loss curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--steps", type=int, help="optimizer steps of every case")
    parser.add_argument("--row-budget", type=int, default=65536, help="tokens of one expanded row")
    parser.add_argument("--impl", help="implementation of the trie run; default triton, dense with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    args = parser.parse_args(argv)
    cases = {"tiny": TINY} if args.tiny else {name: CASES[name] for name in args.cases.split(",")}
    if args.steps:
        cases = {name: case._replace(steps=args.steps) for name, case in cases.items()}
    device = torch.device("cpu" if args.tiny else "cuda")
    impls = {"trie": args.impl or ("dense" if args.tiny else "triton"), "expanded": "varlen"}
    args.out.mkdir(parents=True, exist_ok=True)
    label = device_slug(device.type)
    command = "python -m benchmarks.bench_sft " + " ".join(sys.argv[1:] if argv is None else argv)
    records: list[dict[str, Any]] = []
    for name, case in cases.items():
        records += run_case(name, case, impls, device, args.row_budget)
        write_records(args.out / f"sft-{label}.json", records, command=command, seed=0, device=device.type)
    plot(records, args.out / f"sft_loss-{label}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
