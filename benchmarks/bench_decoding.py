"""What decoding costs and gains: the decoder's own time, fork/join against sequential text, in tokens and by the clock.

    python -m benchmarks.bench_decoding overhead quickstart --models DIR     one CPU core; DIR made by the quickstart
    python -m benchmarks.bench_decoding quickstart --models DIR --seconds 12 --out FILE.json    the same on a GPU
    python -m benchmarks.bench_decoding forced --seconds 15 --out FILE.json  on a GPU, two to three minutes

overhead    a scripted engine that answers at once: calls per second of the whole decoder
quickstart  both models of a quickstart, each its own response, 1 and 16 problems at a time; 1, 4 and 64 on a GPU, where
            they decode in bfloat16
forced      random weights of the Qwen3-0.6B shape that are made to fork (benchmarks/forced_model.py): sequential and
            fork/join write the same number of tokens, 1, 4 and 64 trajectories at a time; the faster engine comes
            first, the JSON is written after every batch, and its meta names the trajectory, what was measured and what
            is still left out

Sequential and fork/join runs alternate, medians are taken. `speedup_tokens` is sequential tokens over the critical
path, `speedup_wall` the ratio of the wall clocks, `speedup_cpu` that of CPU seconds, which a busy machine changes less.
`transformers_warm` sends the shared prefix of a fork alone before the threads. Results stand beside right ones: every
trajectory must end by itself, fork as planned and, for the quickstart, box an answer.
"""

import argparse
import asyncio
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.forced_model import EOS, TAG_IDS, WORD, Plan, force
from benchmarks.records import command_line, read_results, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tw_core import TagIds
from tw_recipes.decoding import GREEDY, ForkJoinDecoder, Limits, Request, Rollout, ScriptedEngine, TransformersEngine
from tw_recipes.decoding.lockstep_engine import LockstepEngine

Records = list[dict[str, Any]]
UNITS = {"calls_per_s": "calls/s", "calls_per_cpu_s": "calls/s", "tokens": "tokens", "token_latency": "tokens"}
UNITS |= {"rounds": "rounds", "trajectories": "trajectories"}
# Short: a token takes 80 ms in transformers' continuous batching on an H100.
FORCED = Plan(before=4, words=32, after=4)


def keep(records: Records, case: str, impl: str, **metrics: float) -> None:
    for metric, value in metrics.items():
        unit = UNITS.get(metric, "s" if metric.endswith("seconds") else "share" if metric.endswith("share") else "x")
        records.append({"case": case, "impl": impl, "metric": metric, "value": round(float(value), 4), "unit": unit})
        print(f"{case:14} {impl:18} {metric:24} {value:12.4f} {unit}", flush=True)


# The decoder alone.


def overhead(records: Records, options: argparse.Namespace) -> None:
    """Trajectories of one block and 320 tokens from an engine that takes no time, one and a thousand at once."""
    plan = Plan()

    def answer(request: Request) -> list[int]:
        if TAG_IDS.thread_close in request.stop_ids:
            return plan.thread()
        return plan.closing() if TAG_IDS.thread_close in request.context[plan.prompt_tokens :] else plan.opening()

    for at_once in (1, 1_000):
        walls, cpus = [], []
        for _ in range(options.rounds):
            engine = ScriptedEngine(answer, [EOS])
            decoder = ForkJoinDecoder(engine, TAG_IDS, Limits(max_depth=1), GREEDY)
            wall, cpu, rollouts = _run(decoder, [[WORD] * plan.prompt_tokens] * 1_000, at_once)
            assert all(len(rollout.units) == plan.threads + 2 and rollout.complete for rollout in rollouts)
            walls.append(wall / len(engine.requests))
            cpus.append(cpu / len(engine.requests))
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        keep(records, f"in_flight_{at_once}", "scripted", calls_per_s=1 / wall, calls_per_cpu_s=1 / cpu)
    _write(records, options)


def _run(decoder: ForkJoinDecoder, prompts: Sequence[Any], at_once: int) -> tuple[float, float, list[Rollout]]:
    """Wall clock, CPU seconds and rollouts of all prompts, so many trajectories at a time; the engine stays open."""

    async def every() -> list[tuple[int, Rollout]]:
        return [entry async for entry in decoder.stream(prompts, max_trajectories=at_once)]

    return _timed(every)


def _timed(every: Callable[[], Any], runner: asyncio.Runner | None = None) -> tuple[float, float, list[Rollout]]:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    found = asyncio.run(every()) if runner is None else runner.run(every())
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, [rollout for _, rollout in sorted(found, key=lambda entry: entry[0])]


# Two styles against each other.


@dataclass
class Side:
    """One style on one engine: its model is ready, its decoder too; `times` grows by a round each."""

    decoder: ForkJoinDecoder
    prompts: Sequence[Any]
    before: Callable[[], Any] = lambda: None
    after: Callable[[Any], None] = lambda _: None

    def measure(self, runner: asyncio.Runner, at_once: int, count: int) -> tuple[float, float, list[Rollout]]:
        """Wall clock, CPU seconds and rollouts of the first `count` prompts, `at_once` at a time."""
        handle = self.before()
        try:

            async def timed() -> list[tuple[int, Rollout]]:
                chosen = self.prompts[:count]
                return [entry async for entry in self.decoder.stream(chosen, max_trajectories=at_once)]

            async def started() -> None:
                # Not counted: two tokens start the engine; the graphs of `LockstepEngine` need a whole run.
                if isinstance(self.decoder.engine, LockstepEngine) and torch.cuda.is_available():
                    await timed()
                else:
                    first = np.asarray(self.prompts[-1], dtype=np.int64)
                    await self.decoder.engine.generate(Request(first, tuple(self.decoder.engine.eos_ids), 2))

            runner.run(started())
            found = _timed(timed, runner)
            runner.run(self.decoder.engine.aclose())
            return found
        finally:
            self.after(handle)


def compare(
    records: Records,
    case: str,
    impl: str,
    sides: dict[str, Side],
    *,
    at_once: int,
    count: int,
    rounds: int,
    check: Callable[[str, list[Rollout]], None],
    seconds: float = math.inf,
) -> None:
    """Alternate the sides `rounds` times and keep what they take per problem, and the ratios to "sequential".

    After the first round, none is begun that would probably end later than `seconds` after the start.
    """
    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpus: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, list[Rollout]] = {}
    started = time.perf_counter()
    with asyncio.Runner() as runner:
        for done in range(rounds):
            if done and (time.perf_counter() - started) * (done + 1) / done > seconds:
                break
            for name, side in sides.items():
                wall, cpu, last[name] = side.measure(runner, at_once, count)
                walls[name].append(wall / count)
                cpus[name].append(cpu / count)
    for name, rollouts in last.items():
        check(name, rollouts)
    wall = {name: statistics.median(times) for name, times in walls.items()}
    cpu = {name: statistics.median(times) for name, times in cpus.items()}
    base = np.array([rollout.stats.total_tokens for rollout in last["sequential"]])
    for name, rollouts in last.items():
        kind = impl if name in ("sequential", "forkjoin") else f"{impl}_{name}"
        prefix = "sequential_" if name == "sequential" else ""
        cached = rollouts[0].cached_share is not None
        share = {"cached_share": np.mean([rollout.cached_share for rollout in rollouts])} if cached else {}
        keep(
            *(records, case, kind),
            **{
                f"{prefix}wall_seconds": wall[name],
                f"{prefix}cpu_seconds": cpu[name],
                **{f"{prefix}{metric}": value for metric, value in share.items()},
            },
        )
        if name == "sequential":
            keep(records, case, kind, tokens=base.mean(), rounds=len(walls[name]), trajectories=count)
            continue
        latency = np.array([rollout.stats.critical_path_tokens for rollout in rollouts])
        keep(
            *(records, case, kind),
            token_latency=latency.mean(),
            speedup_tokens=(base / latency).mean(),
            speedup_wall=wall["sequential"] / wall[name],
            speedup_cpu=cpu["sequential"] / cpu[name],
        )


def dtype_on(device: str) -> torch.dtype:
    """What models decode in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def quickstart(records: Records, options: argparse.Namespace) -> None:
    """The two models of a quickstart on its held-out problems."""
    folder: Path = options.models
    batches = options.batches or ([1, 4, 64] if options.device == "cuda" else [1, 16])
    lines = (folder / "data" / "test.jsonl").read_text().splitlines()[: max(batches) + 1]
    limits = Limits(max_total_tokens=640, max_thread_tokens=320)

    def side(name: str, engine: str, warm: bool = False) -> Side:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype_on(options.device))
        model = model.to(options.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        made = (
            TransformersEngine(model)
            if engine == "transformers"
            else LockstepEngine(model, eos_ids=[tokenizer.eos_token_id])
        )
        own = limits if name == "forkjoin" else limits.sequential()
        decoder = ForkJoinDecoder(made, TagIds.from_tokenizer(tokenizer), own, GREEDY, warm_prefix=warm)
        return Side(decoder, [tokenizer.encode(json.loads(line)["prompt"]) for line in lines])

    def check(name: str, rollouts: list[Rollout]) -> None:
        ended = [rollout.complete and (rollout.stats.num_blocks > 0) == (name != "sequential") for rollout in rollouts]
        assert np.mean(ended) > 0.9, f"{name}: only {np.mean(ended):.0%} of the responses ended as trained"

    for engine in options.engines:
        for at_once in batches:
            sides = {name: side(name, engine) for name in ("sequential", "forkjoin")}
            if engine == "transformers":
                sides["warm"] = side("forkjoin", engine, warm=True)
            compare(
                *(records, f"batch_{at_once}", engine, sides),
                at_once=at_once,
                count=options.single if at_once == 1 else at_once,
                rounds=options.rounds,
                check=check,
                seconds=options.seconds,
            )
            _write(records, options)


def forced(records: Records, options: argparse.Namespace) -> None:
    """Random weights that write the same number of tokens either way."""
    plan = FORCED
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
    shape = {
        **{"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151_936},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096},
        **{"tie_word_embeddings": True, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None},
        **(small if options.tiny else {}),
    }
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen3ForCausalLM(Qwen3Config(**shape)).to(dtype_on(options.device)).eval()
    assert model.num_parameters() > 5e8 or options.tiny
    rng = np.random.default_rng(0)
    limits = Limits(max_depth=1)

    def check(name: str, rollouts: list[Rollout]) -> None:
        threads = 0 if name == "sequential" else plan.threads
        assert all(rollout.complete and rollout.stats.num_threads == threads for rollout in rollouts)
        assert all(rollout.generated_tokens == plan.generated for rollout in rollouts)

    wanted = list(itertools.product(options.engines, options.batches or [1, 4, 64]))
    notes: dict[str, Any] = {"trajectory": asdict(plan), "measured": [], "left_out": []}
    for place, (engine, at_once) in enumerate(wanted):
        prompts = rng.integers(WORD + 1, 500, (at_once + 1, plan.prompt_tokens)).tolist()
        made: Any = (
            TransformersEngine(model, cache_tokens=(at_once + 1) * plan.threads * 384, max_batch_tokens=2_048)
            if engine == "transformers"
            else LockstepEngine(model, eos_ids=[EOS])
        )
        sides = {}
        for name, fork in (("sequential", False), ("forkjoin", True)):
            decoder = ForkJoinDecoder(made, TAG_IDS, limits if fork else limits.sequential(), GREEDY)
            hook = functools.partial(force, model, plan, fork=fork)
            sides[name] = Side(decoder, prompts, hook, lambda handle: handle.remove())
        compare(
            *(records, f"batch_{at_once}", engine, sides),
            at_once=at_once,
            count=at_once,
            rounds=options.rounds,
            check=check,
            seconds=options.seconds,
        )
        names = [f"batch_{count} {used}" for used, count in wanted]
        notes |= {"measured": names[: place + 1], "left_out": names[place + 1 :]}
        _write(records, options, notes)


def _write(records: Records, options: argparse.Namespace, notes: dict[str, Any] | None = None) -> Path:
    """After every case, so that a time-out keeps what was measured."""
    return write_records(
        options.out or "decoding",
        records,
        command=command_line("bench_decoding", options.words),
        seed=0,
        device=options.device,
        merge=options.merge,
        notes=notes,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the parts and write the file."""
    parts = {"overhead": overhead, "quickstart": quickstart, "forced": forced}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=sorted(parts))
    parser.add_argument("--models", type=Path, help="folder of a quickstart")
    parser.add_argument("--out", type=Path, help="results file; default: benchmarks/results/decoding-<device>.json")
    parser.add_argument("--merge", type=read_results, help="results file to add to: other (case, impl) pairs are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=int, default=3, help="quickstart: problems one at a time")
    parser.add_argument("--batches", type=int, nargs="+", help="problems at a time; default: see above")
    parser.add_argument("--engines", nargs="+", default=["lockstep", "transformers"])
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for the rounds of one batch")
    parser.add_argument("--tiny", action="store_true", help="forced: a tiny model, to see that it runs")
    options = parser.parse_args(argv, argparse.Namespace(words=sys.argv[1:] if argv is None else argv))
    if "quickstart" in options.parts and options.models is None:
        parser.error("quickstart needs --models DIR; make one with `threadweaver quickstart --out DIR`")
    records: Records = []
    for name in options.parts:
        parts[name](records, options)
    print(f"{len(records)} records written", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
