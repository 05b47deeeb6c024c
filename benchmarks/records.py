"""Results files: benchmarks/results/<bench>-<device>.json, the only source of published figures.

A record is {"case", "impl", "metric", "value", "unit"}; `meta` says on what and by which command it was measured.
tools/tables.py makes the tables of README and docs from these files.
"""

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIELDS = ("case", "impl", "metric", "value", "unit")


def write_records(
    bench: str | Path,
    records: Iterable[Mapping[str, Any]],
    *,
    command: str,
    seed: int,
    device: str | None = None,
    merge: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write one results file, replacing an old one as a whole, and return its path.

    Args:
        bench: Name of the benchmark, for benchmarks/results/<bench>-<device>.json; or the path of a .json file.
        records: {"case", "impl", "metric", "value", "unit"} each; values are finite numbers.
        command: What gives these figures again.
        seed: Seed of the inputs.
        device: "cpu" or "cuda", what was measured. Defaults to "cuda" where there is one.
        merge: Content of an earlier results file: what it says on other (case, impl) pairs is kept, its meta goes to
            "earlier".
        notes: More for `meta`: what was measured and how, in the benchmark's own words.

    Raises:
        ValueError: No record, a record with other fields, or a value that is not a finite number.
    """
    rows = [dict(record) for record in records]
    if not rows:
        raise ValueError("records is empty; measure something before writing")
    for i, row in enumerate(rows):
        if tuple(sorted(row)) != tuple(sorted(FIELDS)):
            raise ValueError(f"records[{i}] must have the fields {', '.join(FIELDS)}, got {', '.join(row)}")
        if not math.isfinite(row["value"]):
            raise ValueError(f"records[{i}] has the value {row['value']}; leave out what was not measured")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    about = meta(command, seed, device) | dict(notes or {})
    if merge is not None:
        rows = merge_records(merge, rows)
        before = {name: value for name, value in merge["meta"].items() if name != "earlier"}
        about["earlier"] = [*merge["meta"].get("earlier", []), before]
    path = Path(bench) if str(bench).endswith(".json") else RESULTS / f"{bench}-{device_slug(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"meta": about, "records": rows}, indent=1) + "\n")
    unfinished.replace(path)
    return path


def read_results(path: str | Path | None) -> dict[str, Any] | None:
    """Content of an earlier results file, for `merge`; None stays None."""
    return json.loads(Path(path).read_text()) if path else None


def command_line(bench: str, words: Iterable[str]) -> str:
    """What gives the figures again, for `meta`: without the options that name files, which are of one machine."""
    parts, shown = iter(words), []
    for word in parts:
        if word in ("--out", "--merge", "--models"):
            next(parts, None)
            shown += ["--models", "DIR"] if word == "--models" else []
        else:
            shown.append(word)
    return " ".join(["python -m", f"benchmarks.{bench}", *shown])


def merge_records(earlier: Mapping[str, Any] | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of an earlier results file on other (case, impl) pairs, then `rows`."""
    anew = {(row["case"], row["impl"]) for row in rows}
    kept = earlier["records"] if earlier else []
    return [row for row in kept if (row["case"], row["impl"]) not in anew] + rows


def meta(command: str, seed: int, device: str) -> dict[str, Any]:
    """Where figures come from: command, device, versions, commit, date, seed."""
    return {
        "command": command,
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seed": seed,
    }


def device_name(device: str) -> str:
    """The device in words: the GPU's name, or the CPU's model."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_slug(device: str) -> str:
    """The device in a file name: "cpu", "h100"."""
    if device == "cpu":
        return "cpu"
    return next(word for word in device_name(device).lower().split() if word not in ("nvidia", "amd", "geforce"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash of HEAD, with "+" where tracked files differ from it; None outside a repository."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
