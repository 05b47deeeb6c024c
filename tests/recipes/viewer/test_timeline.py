"""Calls over time: a line a thread, bars as long as the calls."""

import re

from tw_recipes.viewer.timeline import timeline_svg


def call(path, queued, started, ended, **more):
    return {"kind": "thread", "path": path, "queued": queued, "started": started, "ended": ended} | {
        "tokens": 7,
        "finish": "stop",
        **more,
    }


CALLS = [call([], 1.0, 1.0, 2.0, kind="sequential"), call([[0, "1"]], 2.0, 2.0, 4.0), call([[0, "2"]], 2.0, 2.5, 3.0)]


def test_threads_are_lines_and_seconds_are_widths():
    svg = timeline_svg([*CALLS, call([], 4.0, 4.0, 5.0, kind="sequential")])
    assert re.findall(r"<text[^>]*>(.*?)</text>", svg) == ["sequential", "1.1", "1.2", "0 s", "4 s"]
    found = re.findall(r'class="run" x="([\d.]+)" y="(\d+)" width="([\d.]+)"', svg)
    bars = [(float(x), float(y), float(width)) for x, y, width in found]
    second = bars[0][2]
    assert [round(width / second, 1) for _, _, width in bars] == [1, 1, 2, 0.5]
    assert bars[0][1] == bars[1][1], "both sequential calls stand on one line"
    waits = [float(width) for width in re.findall(r'class="wait"[^>]*width="([\d.]+)"', svg)]
    assert [round(wait / second, 1) for wait in waits] == [0, 0, 0, 0.5]


def test_nothing_of_an_engine_is_markup():
    svg = timeline_svg([call([[0, "<b>"]], 0.0, 0.0, 1.0, finish="<script>")])
    assert "<b>" not in svg
    assert "<script>" not in svg


def test_no_calls_no_picture():
    assert timeline_svg([]) == ""
