"""Seeded mistakes in the kernels, each of which the ordinary tests must catch: `python -m tests.kernels.mutants`.

Each mutant is one textual edit of a copy of src/; the tests below run against the copy and must fail. Exits non-zero
when a mutant survives, or when its edit no longer applies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "tw_kernels/trie_attention"
TESTS = ["tests/kernels/test_triton.py", "tests/kernels/test_plan.py"]


class Mutant(NamedTuple):
    """One mistake: in `file`, `old` becomes `new`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant("interval off by one", "tiles.py", "(q_rows < k_ends)", "(q_rows <= k_ends)"),
    Mutant("missing diagonal", "tiles.py", "(k_rows <= q_rows)", "(k_rows < q_rows)"),
    Mutant("skipped partial tile", "plan.py", "(high > first[:, None])", "(high > first[:, None] + 1)"),
    Mutant("full tile that is partial", "plan.py", "(low >= past[:, None])", "(low >= past[:, None] - 1)"),
    Mutant("wrong transpose plan", "plan.py", "(partial.T, full.T, key_start", "(partial, full, key_start"),
    Mutant("missing rescale", "forward.py", "acc = acc * rescale[:, None]", "acc = acc * 1.0"),
    Mutant("wrong window edge", "tiles.py", "(q_depths - k_depths < window)", "(q_depths - k_depths <= window)"),
    Mutant("missing GQA group", "backward.py", "head = kv_head * GROUP + t % GROUP", "head = kv_head * GROUP"),
    Mutant("stale lse", "forward.py", "lse = (row_max + tl.log2(row_sum)) * LN_2", "lse = row_max * LN_2"),
    Mutant("stale plan", "memo.py", "x.stride(), x.dtype, x._version)", "x.stride(), x.dtype)"),
    Mutant("missing delta", "backward.py", "ds = p * (dp - delta[None, :])", "ds = p * dp"),
    Mutant("last rows unmasked", "tiles.py", "mask=rows < n_rows, other=0)", "mask=rows < n_rows - 1, other=0)"),
    Mutant("sink without its gradient", "backward.py", "-(sink_p * delta).sum(1)", "(sink_p * delta).sum(1)"),
]


def survives(mutant: Mutant) -> str | None:
    """None when the tests catch the mutant, else what happened."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / FOLDER / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            return f"{mutant.file} no longer holds {mutant.old!r}; update the mutant"
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode == 1:  # tests ran and failed
            return None
        return f"pytest returned {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"


def main(workers: int = 2) -> int:
    """Try all mutants; print a line each."""
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(survives, MUTANTS))
    for mutant, result in zip(MUTANTS, results, strict=True):
        print(f"{'caught  ' if result is None else 'SURVIVED'} {mutant.name}{'' if result is None else ': ' + result}")
    return int(any(results))


if __name__ == "__main__":
    sys.exit(main())
