"""What ptxas makes of the Hopper kernels, with the installed Triton and with a second version.

No GPU is needed. TW_OTHER_TRITON names the Python of an environment with another Triton (`make test-oldest-triton`
makes one and sets it); without it the second half is skipped.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tw_kernels.trie_attention.hopper import launch, support

SHARED_90 = 232_448  # bytes that a block can have
# Bytes that all groups together may spill: the backward for heads of 128 holds every register, and what is spilled are
# loop constants; for wide heads it is outside of the loop over tiles (docs/performance.md).
SPILLS = {("backward", (128, 128)): 210, ("forward", (192, 128)): 16, ("forward", (256, 256)): 184}
SPILLS_3_6 = {("backward", (128, 128)): 210, ("wide_backward", (256, 256)): 28}

JOBS = [
    {"kernel": kernel, "dims": dims, "dtype": dtype, "constants": constants}
    for dims in support.HEAD_DIMS
    for dtype in ("bfloat16", "float16")
    for kernel, choices in {
        "forward": [{}],
        "backward": [{}, {"WITH_DQ": False}] if dims not in launch.WIDE_PASSES else [],
        "wide_backward": launch.WIDE_PASSES.get(dims, []),
    }.items()
    for constants in choices
]
QUICK = [job for job in JOBS if job["dtype"] == "bfloat16" and job["dims"] != (64, 64)]
QUICK += [{"kernel": "backward", "dims": (64, 64), "dtype": "float16", "constants": {}}]


def reports(python: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["src", "."])
    done = subprocess.run(
        [python, "-m", "tests.support.compiled_gluon"],
        input="\n".join(map(json.dumps, jobs)),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(report: dict[str, Any]) -> None:
    job = report["job"]
    assert report["serialized"] == [], report
    assert report["wgmma"] >= 32, report
    assert report["registers"] == 168, report  # a third of the file each, before the groups trade registers
    assert report["shared"] <= SHARED_90, report
    spills = SPILLS_3_6 if report["triton"].startswith("3.6.") else SPILLS
    assert report["spill_bytes"] <= spills.get((job["kernel"], tuple(job["dims"])), 0), report
    assert {"n_rows", "num_blocks", "kv_heads", "group"} <= set(report["general"]), report


def test_sm_90_with_the_installed_triton() -> None:
    got = reports(sys.executable, QUICK)
    assert len(got) == len(QUICK) == 9
    for report in got:
        check(report)


@pytest.mark.slow
def test_sm_90_with_the_installed_triton_all_shapes() -> None:
    for report in reports(sys.executable, JOBS):
        check(report)


@pytest.mark.skipif("TW_OTHER_TRITON" not in os.environ, reason="TW_OTHER_TRITON names no Python with another Triton")
def test_sm_90_with_another_triton() -> None:
    import triton

    got = reports(os.environ["TW_OTHER_TRITON"], JOBS)
    assert len(got) == len(JOBS)
    for report in got:
        assert report["triton"] != triton.__version__
        check(report)
