"""The quickstart for several seeds: figures of each and their mean -> benchmarks/results/quickstart-cpu.json.

    python -m benchmarks.bench_quickstart --seeds 0 1 2 --out out/quickstart-seeds      a few minutes a seed
    … --reuse           takes the results.json of runs that are there already

Wall-clock figures are those of the machine as it was; accuracy and tokens depend on seed and versions alone.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.records import write_records

from tw_recipes.pipelines import quickstart

METRICS = {
    "sequential": ("accuracy", "tokens", "token_latency", "wall_seconds_single"),
    "forkjoin": (
        "accuracy",
        "tokens",
        "token_latency",
        "speedup_tokens",
        "wall_seconds_single",
        "speedup_wall",
        "format_correct",
    ),
}
UNITS = {
    "tokens": "tokens",
    "token_latency": "tokens",
    "wall_seconds_single": "s",
    "speedup_tokens": "x",
    "speedup_wall": "x",
}


def records(results: dict[str, Any], case: str) -> list[dict[str, Any]]:
    """The records of one run."""
    found = [
        {
            "case": case,
            "impl": impl,
            "metric": metric,
            "value": results[impl][metric],
            "unit": UNITS.get(metric, "share"),
        }
        for impl, metrics in METRICS.items()
        for metric in metrics
    ]
    total = sum(results["meta"]["seconds"].values())
    threads = results["meta"]["threads"]
    return [
        *found,
        {"case": case, "impl": "both", "metric": "total_seconds", "value": total, "unit": "s"},
        {"case": case, "impl": "both", "metric": "threads", "value": threads, "unit": "threads"},
    ]


def mean(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records' mean over runs."""
    return [
        {**rows[0], "case": "mean", "value": math.fsum(row["value"] for row in rows) / len(rows)}
        for rows in zip(*runs, strict=True)
    ]


def main() -> None:
    """Run the seeds one after another and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart-seeds"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reuse", action="store_true", help="read finished runs instead of running")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        folder = options.out / str(seed)
        words = ["--seed", str(seed), "--threads", str(options.threads), "--out", str(folder)]
        if not options.reuse and quickstart.main(words):
            raise SystemExit(f"the run of seed {seed} failed; its message is above")
        runs.append(records(json.loads((folder / "results.json").read_text()), f"seed_{seed}"))
    command = f"python -m benchmarks.bench_quickstart --seeds {' '.join(map(str, options.seeds))}"
    path = write_records(
        "quickstart",
        [record for run in [*runs, mean(runs)] for record in run],
        command=f"{command} --threads {options.threads}",
        seed=options.seeds[0],
        device="cpu",
    )
    print(path)


if __name__ == "__main__":
    main()
