"""An update step of TrieGRPOTrainer beside one of TRL's GRPOTrainer, and fork/join groups beside their units.

    python -m benchmarks.bench_grpo --out DIR/grpo-h100.json     Qwen3-4B with LoRA and Qwen3-0.6B in full, one GPU
    python -m benchmarks.bench_grpo --tiny --out FILE            the same code on a CPU (its test)
    … --compile                                                  with the layers compiled, on both sides; "_compiled"
    … --graphs                                                   graph_rows=16384 for the trie; cases "_graphs"

A step is what the trainers do with a scored micro-batch: `compute_loss` (with its metrics), backward, clipping, AdamW.
Both have random weights of the shape, bfloat16, activation checkpointing and TRL's fused head; step_ms is the median of
`--repeats` steps after one that warms up (fewer where they last longer than `--seconds`; first_step_ms is its own time,
with what is compiled and captured in it), peak_mib the allocator's
peak without the other trainer's model, step_mib that peak less what was allocated before the step (weights, optimizer
state). The trie runs through impl="auto"; meta says which that was. Both trainers stand side by side, and the JSON is
written after every case.

Cases: pP_cC[_xK] is K prompts (default 1) of P tokens with 8 completions of C tokens each, in one micro-batch on both
sides. All are of one length, so that stock pads nothing and its attention takes the causal flash kernels: its best
case. With one short prompt the trie has fewer rows than the host needs to keep the GPU busy; the cases with several
prompts are the step of a run. forkjoin is a group of 4 fork/join rollouts of two blocks; "units" computes every engine
call as a sequence of its own, padding-free, through varlen flash attention.

gradient_difference is |g_trie - g_other| / |g_other| over all trained parameters at the first step, sums in float64. In
bfloat16 it shows rounding and gross mistakes; equality is tested in float32 (tests/recipes/grpo).

flop_ratio counts forward, recomputation and backward of linear layers, attention and head; sharing_efficiency =
(step_ms of the other / step_ms of trie) / flop_ratio.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks.attention_runs import auto_choice
from benchmarks.records import command_line, read_results, write_records
from peft import LoraConfig
from tests.support.grpo import make_trainer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer

from tw_core import PackedTrie, ReasoningTrie, Unit
from tw_core.flops import ATTENTION_BACKWARD, LINEAR_BACKWARD, Work, expanded_work, flops, trie_work
from tw_recipes import TrieGRPOTrainer
from tw_recipes.grpo.layout import PackedForward, ScoredSequences, scored_sequences
from tw_recipes.pipelines.training import compile_layers

GROUP = 8
GRAPH_ROWS = 16384
_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}


class Shape(NamedTuple):
    """A model and what is trained of it."""

    config: dict[str, Any]
    lora: bool


SHAPES = {
    "qwen3_4b_lora": Shape(
        {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        lora=True,
    ),
    "qwen3_0.6b_full": Shape(
        {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        lora=False,
    ),
    "tiny_lora": Shape(
        {
            **_QWEN3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "head_dim": 8,
            "vocab_size": 512,
        },
        lora=True,
    ),
}
SHAPES["tiny_full"] = SHAPES["tiny_lora"]._replace(lora=False)
# What fits two minutes each, the most telling first. Left out: 8k + 1k and 8k + 4k (73,728 and 98,304 tokens in the
# other's batch), 2k + 256 and 512 + 256 with LoRA, which lie between the cases measured. p8192_c256_x2 comes before a
# third trainer stands beside: stock needs 64 GiB for its 135,168 tokens, three times as many would not fit.
CASES = {
    "qwen3_4b_lora": ["p8192_c256_x2", "p8192_c256", "p256_c4096", "forkjoin_20k", "p2048_c1024"],
    "qwen3_0.6b_full": [
        "p8192_c256_x4", "p2048_c1024_x4", "p512_c256_x16", "p8192_c256", "p256_c4096", "p2048_c1024", "p2048_c4096",
        "p512_c256_x4", "p512_c4096", "forkjoin_30k",
    ],
    "tiny_lora": ["p24_c8", "forkjoin_0.3k"],
    "tiny_full": ["p24_c8_x2"],
}  # fmt: skip


class Batch(NamedTuple):
    """A scored micro-batch, and its sequences as an implementation without tries computes them."""

    inputs: dict[str, Tensor]
    expanded: ScoredSequences


class UnitsTrainer(TrieGRPOTrainer):
    """The same loss with nothing shared: each sequence a chain, one after another in one row, without padding."""

    expanded: ScoredSequences

    def _plan(self, sequences: ScoredSequences) -> list[PackedForward]:
        each = zip(self.expanded.tokens, self.expanded.masks, strict=True)
        packed = PackedTrie.concat([ReasoningTrie.from_sequences([ids], [mask]).pack() for ids, mask in each])
        slots = torch.from_numpy(np.concatenate(self.expanded.slots))
        return [PackedForward(packed, packed.trained_tokens().targets, slots)]


def linear_batch(case: str, vocab: int) -> Batch:
    """K prompts with 8 completions each: "p512_c256_x4"."""
    words = {word[0]: int(word[1:]) for word in case.split("_")}
    prompt, length, prompts = words["p"], words["c"], words.get("x", 1)
    draw = torch.Generator().manual_seed(0)
    rows = prompts * GROUP
    prompt_ids = torch.randint(0, vocab, (prompts, prompt), generator=draw).repeat_interleave(GROUP, 0)
    completion_ids = torch.randint(0, vocab, (rows, length), generator=draw)
    inputs = _inputs(prompt_ids, completion_ids, torch.ones(rows, length, dtype=torch.int64), draw)
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    return Batch(inputs, scored_sequences(ids, torch.ones_like(ids), length))


def fork_join_batch(case: str, vocab: int) -> Batch:
    """Four rollouts of one prompt, two blocks of 3 to 5 threads each; "forkjoin_30k": about that many rows."""
    scale = float(case.removeprefix("forkjoin_").removesuffix("k")) / 35
    sizes, ids = np.random.default_rng(0), np.random.default_rng(1)

    def tokens(mean: float, spread: float = 0.4) -> list[int]:
        return ids.integers(0, vocab, max(2, int(scale * mean * sizes.uniform(1 - spread, 1 + spread)))).tolist()

    prompt = tokens(1024, 0)
    tries, units = [], []
    for _ in range(4):
        context, calls = prompt, []
        for _ in range(2):
            opening = tokens(600)
            calls.append(Unit(context, opening))
            context = context + opening
            bodies = [(tokens(8), tokens(500)) for _ in range(sizes.integers(3, 6))]
            calls += [Unit(context + header, body) for header, body in bodies]
            context = context + [token for header, body in bodies for token in header + body]
        calls.append(Unit(context, tokens(700)))
        units.append(calls)
        tries.append(ReasoningTrie.from_units(calls))
    start, length = len(prompt), max(trie.num_tokens for trie in tries) - len(prompt)
    completion_ids, generated = torch.zeros(2, 4, length, dtype=torch.int64)
    completion_mask, parents = torch.zeros(4, length, dtype=torch.int64), torch.full((4, length), -2)
    expanded = ScoredSequences([], [], [])
    for row, (trie, calls) in enumerate(zip(tries, units, strict=True)):
        size = trie.num_tokens - start
        completion_ids[row, :size] = torch.from_numpy(trie.input_ids[start:])
        completion_mask[row, :size] = 1
        generated[row, :size] = torch.from_numpy(trie.weights[start:] > 0)
        parents[row, :size] = torch.from_numpy(np.maximum(trie.parent[start:] - start, -1))
        for i, call in enumerate(calls):
            mask = trie.loss_mask(i)
            expanded.tokens.append(np.concatenate([call.context, call.completion]))
            expanded.masks.append(mask)
            expanded.slots.append(row * length + trie.sequence_rows(i)[mask] - start)
    prompt_ids = torch.tensor(prompt).expand(4, -1)
    inputs = _inputs(prompt_ids, completion_ids, completion_mask, torch.Generator().manual_seed(0))
    return Batch(inputs | {"completion_parents": parents, "tool_mask": generated}, expanded)


def _inputs(prompt_ids: Tensor, completion_ids: Tensor, mask: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "advantages": torch.randn(len(mask), generator=draw),
        "num_items_in_batch": mask.sum(),
    }


def build(
    shape: Shape, kind: str, device: torch.device, impl: str, compiled: bool = False, graph_rows: int = 0
) -> GRPOTrainer:
    """A trainer of `kind` "stock", "trie" or "units" around a random model, the same for each kind."""
    torch.manual_seed(0)
    with torch.device(device):
        config = Qwen3Config(**shape.config, max_position_embeddings=65536, pad_token_id=0)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    options: dict[str, Any] = {"attention_impl": impl, "max_tokens_per_forward": 2**20} if kind != "stock" else {}
    options |= {"graph_rows": graph_rows} if kind == "trie" else {}
    trainer = make_trainer(
        "stock" if kind == "stock" else "trie",
        tempfile.mkdtemp(),
        model=model,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if shape.lora else None,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        **options,
    )
    if kind == "units":
        trainer.__class__ = UnitsTrainer
    trainer.current_gradient_accumulation_steps = 1
    # `train()` would switch it on.
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model.train()
    if compiled:
        compile_layers(trainer.model)
    return trainer


class Measured(NamedTuple):
    """One case on one trainer: figures by metric, and the first step's gradient, on the CPU, for another trainer."""

    figures: dict[str, float]
    gradient: list[Tensor]


def measure(trainer: GRPOTrainer, batch: Batch, repeats: int, limit: float, other: Measured | None = None) -> Measured:
    """Median time of an update step, memory, and the first step's gradient or how far it is from `other`'s."""
    device = trainer.accelerator.device
    cuda = device.type == "cuda"
    model_bytes = sum(parameter.nbytes for parameter in trainer.model.parameters())
    beside = torch.cuda.memory_allocated() - model_bytes if cuda else 0
    on_device = {name: tensor.to(device) for name, tensor in batch.inputs.items() if name != "completion_parents"}
    inputs = {**batch.inputs, **on_device}
    if isinstance(trainer, UnitsTrainer):
        trainer.expanded = batch.expanded
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=cuda)
    gradient: list[Tensor] = []
    figures: dict[str, float] = {}
    seconds, before = [], 0
    for step in range(repeats + 1):
        if cuda and step == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        trainer.compute_loss(trainer.model, inputs).backward()
        if step == 0:
            gradient = [parameter.grad for parameter in trained]
            figures["gradient_norm"] = norm(gradient)
            if other is not None:
                figures["gradient_difference"] = difference(gradient, other.gradient)
            gradient = [tensor.to("cpu", copy=True) for tensor in gradient] if other is None else []
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if step and sum(seconds[1:]) > limit:
            break
    figures |= {"step_ms": 1e3 * median(seconds[1:]), "first_step_ms": 1e3 * seconds[0]}
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak_mib": (peak - beside) / 2**20, "step_mib": (peak - before) / 2**20}
    return Measured(figures, gradient)


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all entries, summed in float64."""
    return math.sqrt(sum(float(tensor.float().square().sum(dtype=torch.float64)) for tensor in tensors))


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """|ours - theirs| / |theirs| over all entries."""
    apart = (mine.float() - other.to(mine.device).float() for mine, other in zip(ours, theirs, strict=True))
    return norm(apart) / norm(tensor.to(ours[0].device) for tensor in theirs)


def step_flops(config: Any, work: Work, lora: bool) -> float:
    """FLOPs of a step with activation checkpointing; frozen weights need no gradient of their own."""
    once = flops(config, work)
    linear = 2 + (LINEAR_BACKWARD / 2 if lora else LINEAR_BACKWARD)
    return linear * once.linear + (2 + ATTENTION_BACKWARD) * once.attention + (1 + LINEAR_BACKWARD) * once.head


def run_shape(
    name: str,
    cases: list[str],
    device: torch.device,
    impls: dict[str, str],
    repeats: int,
    limit: float,
    compiled: bool = False,
    graph_rows: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """The records of each case of one shape; a trainer is built when a case first needs it, and kept."""
    shape = SHAPES[name]
    config = Qwen3Config(**shape.config)
    trainers: dict[str, GRPOTrainer] = {}
    for case in cases:
        forks = case.startswith("forkjoin")
        other = "units" if forks else "stock"
        batch = (fork_join_batch if forks else linear_batch)(case, config.vocab_size)
        found: dict[str, Measured] = {}
        for kind in (other, "trie"):
            if kind not in trainers:
                trainers[kind] = build(shape, kind, device, impls.get(kind, ""), compiled, graph_rows)
            try:
                found[kind] = measure(trainers[kind], batch, repeats, limit, found.get(other))
                print(f"{name} {case} {kind} {found[kind].figures}", flush=True)
            except torch.OutOfMemoryError:
                print(f"{name} {case} {kind} does not fit this device: the case is left out", flush=True)
                trainers[kind].model.zero_grad()
                break
            finally:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        else:
            label = f"{name}{'_compiled' if compiled else ''}{'_graphs' if graph_rows else ''}/{case}"
            yield case_records(label, config, shape.lora, batch, found[other], found["trie"], other)


def case_records(
    case: str, config: Any, lora: bool, batch: Batch, other: Measured, trie: Measured, other_name: str
) -> list[dict[str, Any]]:
    """Both sides' figures and what follows from them."""
    folded = ReasoningTrie.from_sequences(batch.expanded.tokens, batch.expanded.masks)
    flop_ratio = step_flops(config, expanded_work(folded), lora) / step_flops(config, trie_work(folded), lora)
    speedup = other.figures["step_ms"] / trie.figures["step_ms"]
    ratios = {
        "sharing_ratio": folded.sharing_ratio,
        "flop_ratio": flop_ratio,
        "speedup": speedup,
        "sharing_efficiency": speedup / flop_ratio,
    }
    for metric, of in (("memory_ratio", "peak_mib"), ("step_memory_ratio", "step_mib")):
        if of in trie.figures:
            ratios[metric] = other.figures[of] / trie.figures[of]
    units = {"step_ms": "ms", "first_step_ms": "ms", "peak_mib": "MiB", "step_mib": "MiB"}
    records = []
    for impl, figures in (("trie", trie.figures | ratios), (other_name, other.figures)):
        for metric, value in figures.items():
            unit = units.get(metric, "")
            records.append({"case": case, "impl": impl, "metric": metric, "value": round(value, 9), "unit": unit})
    for metric, value in ratios.items():
        print(f"{case} {metric} {value:.5g}", flush=True)
    return records


def main(argv: list[str] | None = None) -> int:
    """Run the shapes and write the results after each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen3_4b_lora,qwen3_0.6b_full", help="comma-separated")
    parser.add_argument("--cases", help="comma-separated; default: those of the shape")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a case")
    parser.add_argument("--seconds", type=float, default=60.0, help="no further timed step of a case after this time")
    parser.add_argument("--impl", default="auto", help="implementation of the trie run")
    parser.add_argument("--compile", action="store_true", help="compile the layers of both sides")
    parser.add_argument("--graphs", action="store_true", help="replay the layers of the trie as CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="toy models on the CPU")
    parser.add_argument("--out", default="grpo", help="a .json file; default benchmarks/results/grpo-<device>.json")
    parser.add_argument("--merge", type=read_results, help="results file to add to: other (case, impl) pairs are kept")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")
    device = torch.device("cpu" if args.tiny else "cuda")
    impls = {"trie": args.impl, "units": "varlen"}
    records: list[dict[str, Any]] = []
    for name in ("tiny_lora", "tiny_full") if args.tiny else args.shapes.split(","):
        cases = args.cases.split(",") if args.cases else CASES[name]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        used = args.impl if args.impl != "auto" else auto_choice(SHAPES[name].config, device, dtype)
        graph_rows = GRAPH_ROWS if args.graphs else 0
        for found in run_shape(name, cases, device, impls, args.repeats, args.seconds, args.compile, graph_rows):
            records += found
            write_records(
                *(args.out, records),
                command=command_line("bench_grpo", words),
                seed=0,
                device=device.type,
                merge=args.merge,
                notes={"trie_attention": used},
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
