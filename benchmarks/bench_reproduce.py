"""`threadweaver reproduce` for several seeds and ablations -> benchmarks/results/reproduce-<device>.json.

    python -m benchmarks.bench_reproduce --seeds 0 1 2 --out out/reproduce-seeds        minutes a seed
    python -m benchmarks.bench_reproduce --preset h100 --seeds 0 --minutes 8            goes on when called again
    … --ablations std_normalisation leaky_loss rho_0 rounds_0 rounds_2                  each for every seed
    … --at-once         first trains and evaluates all of it at the same time, a process a side; then the wall clocks
    … --reuse           takes the results.json of runs that are there already
    … --merge FILE      keeps FILE's other seeds and ablations; means are over all seeds
    … --only-ablations  the ablations' fork/join side alone, for a FILE that has the method as it is

When --minutes are used up, the file holds the runs that are finished, and the exit status is 3. With --at-once a
trainer of the h100 preset takes up to 25 GB, and total_seconds are those of a shared device.
Cases are seed_<n>, mean and spread (largest - smallest value over the seeds); an ablation's have its name before them.
Accuracy and tokens depend on seed and versions alone, wall clock on the machine as it was.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.records import merge_records, read_results, write_records

from tw_recipes.pipelines.checkpoints import OutOfTime
from tw_recipes.pipelines.quiet import quietly
from tw_recipes.pipelines.reproduce import command
from tw_recipes.pipelines.reproduce.report import stage_figures
from tw_recipes.pipelines.reproduce.rows import SIDES
from tw_recipes.pipelines.reproduce.settings import Settings
from tw_recipes.pipelines.reproduce.sides import Worker
from tw_recipes.pipelines.reproduce.stages import OUT_OF_TIME

ABLATIONS: dict[str, dict[str, Any]] = {
    "std_normalisation": {"std_normalisation": True, "clocks": False},
    "leaky_loss": {"leaky_loss": True, "clocks": False},
    "leaky_loss_sft": {"leaky_loss": True, "clocks": False, "rounds": 0, "rl_steps": 0},
    "rho_0": {"rho": 0.0},
    "rounds_0": {"rounds": 0},
    "rounds_2": {"rounds": 2},
    "nested": {"nested": True},
    "nested_sft": {"nested": True, "clocks": False, "rounds": 0, "rl_steps": 0},
    "no_rl": {"rl_steps": 0},
}
SHARED = ("scale", "threads", "rounds", "rl_steps", "steps", "mixed_steps", "compiled")
METRICS = {
    "accuracy": "share",
    "token_latency": "tokens",
    "total_tokens": "tokens",
    "activation_ratio": "share",
    "format_correctness": "share",
}


def records(results: dict[str, Any], case: str) -> list[dict[str, Any]]:
    """The records of one run: each stage of each side ("forkjoin_sft"), and the ends ("forkjoin")."""
    rows = [row for side, content in results["sides"].items() for row in side_records(side, content["stages"], case)]

    def add(impl: str, metric: str, value: float, unit: str) -> None:
        rows.append({"case": case, "impl": impl, "metric": metric, "value": float(value), "unit": unit})

    for side, content in results["sides"].items():
        for batch, seconds in content["seconds_per_problem"].items():
            add(side, f"wall_seconds_{batch}", seconds, "s")
    add("forkjoin", "speedup_tokens", results["speedup"]["mean"], "x")
    for batch, ratio in results["speedup"]["wall"].items():
        add("forkjoin", f"speedup_wall_{batch}", ratio, "x")
    add("both", "total_seconds", results["seconds"], "s")
    add("both", "cpu_seconds", results["cpu_seconds"], "s")
    return rows


def side_records(side: str, stages: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    """The records of each stage of a side, and those of the last one again under the side's name."""
    rows = []
    for impl, stage in [(f"{side}_{stage['name']}", stage) for stage in stages] + [(side, stages[-1])]:
        found = {name: (stage[name], unit) for name, unit in METRICS.items()}
        found["later_threads_right"] = (stage["threads_right"]["later"], "share")
        for metric, (value, unit) in found.items():
            if value is not None:
                rows.append({"case": case, "impl": impl, "metric": metric, "value": float(value), "unit": unit})
    return rows


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread of what every seed of a variant has, for each variant."""
    by_variant: dict[str, dict[str, dict[tuple[str, str], dict[str, Any]]]] = {}
    for row in rows:
        if found := re.fullmatch(r"(.*?)seed_\d+", row["case"]):
            by_variant.setdefault(found[1], {}).setdefault(row["case"], {})[row["impl"], row["metric"]] = row
    found_rows = []
    for name, by_seed in by_variant.items():
        runs = list(by_seed.values())
        for key, first in runs[0].items():
            if all(key in run for run in runs):
                values = [run[key]["value"] for run in runs]
                found_rows.append({**first, "case": f"{name}mean", "value": math.fsum(values) / len(values)})
                found_rows.append({**first, "case": f"{name}spread", "value": max(values) - min(values)})
    return found_rows


def main() -> int:
    """Run the seeds and ablations one after another and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["cpu", "h100"], default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", nargs="*", choices=list(ABLATIONS), default=[])
    parser.add_argument("--out", type=Path, default=Path("out/reproduce-seeds"))
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--rl-steps", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--mixed-steps", type=int, default=None)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--results", type=Path, default=None, help="another file to write")
    parser.add_argument("--reuse", action="store_true", help="read finished runs instead of running")
    parser.add_argument("--at-once", action="store_true", help="train everything at the same time first")
    parser.add_argument("--merge", type=read_results, help="results file to add to")
    parser.add_argument("--only-ablations", action="store_true", help="only the fork/join side of --ablations")
    options = parser.parse_args()
    if options.only_ablations and (options.at_once or not options.ablations):
        parser.error("--only-ablations needs --ablations and goes without --at-once; drop one or name the ablations")
    shared = {name: getattr(options, name) for name in SHARED}
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    variants = options.ablations if options.only_ablations else ["", *options.ablations]
    rows: list[dict[str, Any]] = []
    finished: list[str] = []
    pause: OutOfTime | None = None
    try:
        if options.at_once:
            _train_at_once(options, shared, until)
        for variant in variants:
            found = []
            for seed in options.seeds:
                name = f"{variant}{'_' if variant else ''}seed_{seed}"
                if options.only_ablations:
                    found += _forkjoin_records(options, shared, variant, seed, until, name)
                else:
                    found += records(_results(options, shared, variant, seed, until), name)
            rows += found
            finished.append(variant)
    except OutOfTime as reached:
        pause = reached
    if pause is not None:
        print(f"{pause}; finished: {', '.join(variant or 'the method as it is' for variant in finished) or 'no run'}")
    if not rows:
        return OUT_OF_TIME
    words = [f"--preset {options.preset}", f"--seeds {' '.join(map(str, options.seeds))}"]
    told = {n: v for n, v in shared.items() if v is not None and v is not False and n != "threads"}
    words += [f"--{n.replace('_', '-')}" + (f" {v}" if v is not True else "") for n, v in told.items()]
    words += ["--at-once"] if options.at_once else []
    words += ["--only-ablations"] if options.only_ablations else []
    named = [variant for variant in finished if variant]
    ablations = f" --ablations {' '.join(named)}" if named else ""
    path = write_records(
        options.results or "reproduce",
        rows + over_seeds(merge_records(options.merge, rows)),
        command=f"python -m benchmarks.bench_reproduce {' '.join(words)}{ablations}",
        seed=options.seeds[0],
        device="cpu" if options.preset == "cpu" else "cuda",
        merge=options.merge,
    )
    print(path)
    return 0 if pause is None else OUT_OF_TIME


def _settings(options: argparse.Namespace, shared: dict[str, Any], variant: str, seed: int) -> Settings:
    return command.settings_of(options.preset, **{**shared, "seed": seed, **ABLATIONS.get(variant, {})})


def _minutes(until: float | None) -> float | None:
    return None if until is None else (until - time.monotonic()) / 60


def _train_at_once(options: argparse.Namespace, shared: dict[str, Any], until: float | None) -> None:
    """One process for each side of every run, for all but the wall clocks; what two of them share, one of them makes.

    Where there are several GPUs, the seeds are dealt out over them.

    Raises:
        OutOfTime: The time is used up.
        RuntimeError: A process failed; its message is on stderr.
    """
    minutes = _minutes(until)
    left = [] if minutes is None else [f"{minutes:.3f}"]
    devices = torch.cuda.device_count()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for variant in ["", *options.ablations]:
            for place, seed in enumerate(options.seeds):
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                if devices > 1:
                    environment["CUDA_VISIBLE_DEVICES"] = str(place % devices)
                folder = options.out / str(seed)
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"settings-{variant or 'base'}.json"
                file.write_text(json.dumps(_settings(options, shared, variant, seed).as_json()))
                for side in SIDES:
                    words = ["-m", "tw_recipes.pipelines.reproduce.sides", str(file), str(folder), side, "1", *left]
                    running[f"{variant or 'base'}, seed {seed}, {side}"] = subprocess.Popen(
                        [sys.executable, *words], env=environment
                    )
        codes = {name: process.wait() for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    if failed := [name for name, code in codes.items() if code not in (0, OUT_OF_TIME)]:
        raise RuntimeError(f"{'; '.join(failed)} failed; the message is above")
    if OUT_OF_TIME in codes.values():
        raise OutOfTime("the time is used up; run the same command again to go on")


def _forkjoin_records(
    options: argparse.Namespace, shared: dict[str, Any], variant: str, seed: int, until: float | None, name: str
) -> list[dict[str, Any]]:
    """The records of the fork/join side of one run, whose sequential side is not made."""
    settings = _settings(options, shared, variant, seed)
    side = quietly(Worker(settings, options.out / str(seed), minutes=_minutes(until)).side)("forkjoin")
    return side_records(
        "forkjoin", [stage_figures(*pair) for pair in zip(side.trained, side.evaluated, strict=True)], name
    )


def _results(
    options: argparse.Namespace, shared: dict[str, Any], variant: str, seed: int, until: float | None
) -> dict[str, Any]:
    """The results.json of one run."""
    # The stages of a seed are in one folder, so that an ablation makes only what it changes.
    folder = options.out / str(seed)
    kept = folder / f"results-{variant or 'base'}.json"
    if not (options.reuse and kept.exists()):
        settings = _settings(options, shared, variant, seed)
        quietly(command.reproduce)(settings, folder, minutes=_minutes(until))
        kept.write_text((folder / "results.json").read_text())
    return json.loads(kept.read_text())


if __name__ == "__main__":
    sys.exit(main())
