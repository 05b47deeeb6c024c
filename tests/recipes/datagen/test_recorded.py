"""The recorded extract cases: annotations -> text with blocks, minus the defects that the specification names.

Defects of the recording: failed checks are ignored, lines of a block that no thread covers are deleted, and blocks
that share lines are both written. There ours must obey, keep, and drop; everywhere else text and verdicts are equal.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tw_core import parse, render
from tw_core.grammar import Block as ForkJoin
from tw_recipes.datagen.blocks import validated
from tw_recipes.datagen.layout import assembled, bodies_of
from tw_recipes.datagen.models import LineRange, OutlinedBlock, ProposedBlock
from tw_recipes.datagen.numbering import Lines
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.reasons import Reason

CASES = json.loads((Path(__file__).parents[2] / "data" / "extract_cases.json").read_text())["cases"]
_EVENT = re.compile(r"<parallel>|</parallel>|</thread> \(range: L(\d+)-L(\d+)")


def proposals(case: dict[str, Any]) -> list[ProposedBlock]:
    """The blocks of an annotation, as the annotator's JSON would give them."""
    if case["kind"] == "unbalanced_threads":  # a thread that never ends is no thread
        return [ProposedBlock(why="", threads=[]) for _ in case["blocks"]]
    found: list[list[LineRange]] = []
    depth = 0
    for event in _EVENT.finditer(case["ann"]):
        if event[0] == "<parallel>":
            depth += 1
            if depth == 1:
                found.append([])
        elif event[0] == "</parallel>":
            depth -= 1
        else:
            found[-1].append(LineRange(first_line=int(event[1]), last_line=int(event[2])))
    return [ProposedBlock(why="", threads=threads) for threads in found]


def has_named_defect(case: dict[str, Any]) -> bool:
    if "check failed" in case["ann"]:
        return True
    spans = [block["range"] for block in case["blocks"]]
    if any(a[1] >= b[0] for a, b in pairwise(sorted(spans))):
        return True
    for block in case["blocks"]:
        threads = block["threads"]
        if threads and [threads[0][0], threads[-1][1]] != block["range"] and len(threads) > 1:
            return True
        if any(b[0] > a[1] + 1 for a, b in pairwise(threads)):
            return True
    return False


def within(case: dict[str, Any], threads: list[list[int]]) -> bool:
    """Whether text of the trace stands between two threads that have lines of it."""
    inside = [thread for thread in threads if thread[0] <= case["traj"].count("\n")]
    return any(b[0] > a[1] + 1 for a, b in pairwise(inside))


def laid_out(text: str) -> list[str | list[str]]:
    """Text outside of blocks, and the threads of each block up to white space at their ends."""
    found: list[str | list[str]] = [""]
    for item in parse(text).items:
        if isinstance(item, ForkJoin):
            found += [[thread.body.strip() for thread in item.threads], ""]
        else:
            found[-1] += item
    return found


def rewritten(case: dict[str, Any]) -> tuple[str, list[int], dict[int, Reason]]:
    lines = Lines.of(case["traj"])
    found = validated(proposals(case), None, lines, StageOptions(min_saving=case["threshold"]))
    blocks = [
        OutlinedBlock(**b.model_dump(), bodies=bodies_of(b, lines), outlines=["plan"] * len(b.threads))
        for b in found.blocks
    ]
    kept = [block.number for block in blocks]
    return render(assembled(blocks, lines)), kept, {d.block: d.reason for d in found.dropped}


@pytest.mark.parametrize("case", [c for c in CASES if not has_named_defect(c)], ids=lambda c: c["kind"])
def test_the_recorded_text_comes_out(case):
    text, kept, _ = rewritten(case)
    assert [number in kept for number in range(1, len(case["kept"]) + 1)] == case["kept"]
    assert laid_out(text) == laid_out(case["out"])


def test_enough_cases_are_compared():
    clean = [case for case in CASES if not has_named_defect(case)]
    assert len(clean) >= 20
    assert {"basic", "two_blocks", "crlf", "blank_thread", "reversed_ranges", "out_of_file"} <= {
        c["kind"] for c in clean
    }


@pytest.mark.parametrize("case", [c for c in CASES if has_named_defect(c)], ids=lambda c: c["kind"])
def test_where_the_recording_is_defective_no_line_is_lost_or_doubled(case):
    text, kept, dropped = rewritten(case)
    flat = []
    for part in laid_out(text):
        flat += part if isinstance(part, list) else [part]
    assert "\n".join(flat).split() == case["traj"].split()
    assert sorted([*kept, *dropped]) == list(range(1, len(case["blocks"]) + 1))
    for number, block in enumerate(case["blocks"], 1):
        if any(b[0] > a[1] + 1 for a, b in pairwise(block["threads"])):
            assert number not in kept or not within(case, block["threads"])


@pytest.mark.parametrize("kind", ["two_blocks_share_one_line", "two_blocks_overlap"])
def test_of_two_blocks_that_share_lines_the_first_stays(kind):
    case = next(case for case in CASES if case["kind"] == kind)
    _, kept, dropped = rewritten(case)
    assert kept == [1]
    assert dropped == {2: Reason.BLOCK_OVERLAP}


def test_lines_between_threads_are_no_block_and_lines_around_them_stay():
    case = next(case for case in CASES if case["kind"] == "gap_lines_are_deleted")
    text, kept, dropped = rewritten(case)
    assert (kept, dropped) == ([], {1: Reason.BLOCK_GAP})
    assert text == case["traj"]
