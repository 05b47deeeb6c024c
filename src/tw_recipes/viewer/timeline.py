"""The engine calls of a rollout as bars over time: one line a thread of the trajectory, as inline SVG.

Guarded by tests/recipes/viewer/test_timeline.py.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_LINE, _LEFT, _WIDTH = 18, 90, 760  # height of a line, width of the labels and of the whole, in SVG units


def timeline_svg(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as bars: waiting light, running dark.

    Args:
        calls: The column "calls" of a rollout: "path" [[block, thread], ...], "queued", "started" and "ended" in
            seconds, "kind", "tokens" and "finish".
    Returns:
        One <svg> element; "" without calls.
    """
    if not calls:
        return ""
    begin = min(call["queued"] for call in calls)
    total = max(max(call["ended"] for call in calls) - begin, 1e-9)

    def x(seconds: float) -> float:
        return round(_LEFT + (seconds - begin) / total * (_WIDTH - _LEFT - 1), 1)

    paths = list(dict.fromkeys(_path(call) for call in calls))
    pieces = []
    for line, path in enumerate(paths):
        pieces.append(f'<text x="0" y="{line * _LINE + 12}">{escape(_label(path))}</text>')
        for call in (call for call in calls if _path(call) == path):
            seconds = call["ended"] - call["started"]
            said = f"{call['kind']}: {call['tokens']} tokens, {seconds:.3f} s, {call['finish']}"
            for kind, start, stop in (
                ("wait", call["queued"], call["started"]),
                ("run", call["started"], call["ended"]),
            ):
                width = max(x(stop) - x(start), 1.0 if kind == "run" else 0.0)
                pieces.append(
                    f'<rect class="{kind}" x="{x(start)}" y="{line * _LINE + 2}" width="{width:.1f}" '
                    f'height="{_LINE - 5}"><title>{escape(said)}</title></rect>'
                )
    height = len(paths) * _LINE + 14
    pieces.append(f'<text x="{_LEFT}" y="{height - 2}">0 s</text>')
    pieces.append(f'<text x="{_WIDTH}" y="{height - 2}" text-anchor="end">{total:.3g} s</text>')
    return f'<svg class="calls" viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(pieces)}</svg>'


def _path(call: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(step) for step in call["path"])


def _label(path: Sequence[Sequence[Any]]) -> str:
    return " / ".join(f"{block + 1}.{thread}" for block, thread in path) or "sequential"
