"""Fork/join text as HTML lanes: sequential text runs down the page, threads of a block stand side by side.

No script and nothing from the network: one string, safe to mail. Everything from a model is escaped.
Guarded by tests/recipes/viewer/test_html.py.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tw_core import parse
from tw_core.grammar import Block, Element

_DEEP = 40  # nested blocks that are drawn as lanes; deeper ones as text

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --lane: #f5f8fc; --fork: #2f6fb3; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #3a4452; --lane: #1d2530; --fork: #6ea8e6; --back: #12171e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; display: inline-block; background: #fff; } figure svg { max-width: 100%; height: auto; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; padding: .6rem 1rem; }
summary { cursor: pointer; } .stats { color: var(--soft); font-size: .85rem; }
.seq { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
.block { border-left: 3px solid var(--fork); margin: .6rem 0; padding-left: .7rem; }
.lanes { display: flex; gap: .6rem; align-items: stretch; overflow-x: auto; }
.lane { flex: 1 1 0; min-width: 11rem; background: var(--lane); border-radius: 6px; padding: .5rem .7rem; }
.lane > b { color: var(--fork); } .plan { color: var(--soft); font-size: .85rem; }
pre { font: 12px/1.35 ui-monospace, monospace; overflow-x: auto; color: var(--soft); }
.prompt { border-left: 3px solid var(--line); padding-left: .7rem; color: var(--soft); }
.problems { color: #c4572b; margin: .4rem 0; padding-left: 1.2rem; }
.calls { width: 100%; max-width: 56rem; display: block; font: 11px ui-monospace, monospace; }
.calls text { fill: var(--soft); } .calls .run { fill: var(--fork); } .calls .wait { fill: var(--line); }
.open { outline: 2px dashed #c4572b; } .right { color: #1f8a4c; } .wrong { color: #c0392b; }
"""


def trajectory_html(
    text: str,
    *,
    title: str = "",
    stats: Mapping[str, Any] | None = None,
    opened: bool = False,
    prompt: str = "",
    problems: Sequence[str] = (),
    below: str = "",
) -> str:
    """One response as a foldable fragment of HTML.

    Args:
        text: Fork/join text, well-formed or not; what is no structure is shown as text.
        title: Heading, plain text.
        stats: Shown below the heading as "name value".
        opened: Whether the fragment starts unfolded.
        prompt: Shown above the response, plain text.
        problems: Listed above the response, plain text.
        below: HTML that follows the response.
    Returns:
        A <details> element; `page` puts it into a document with its style.
    """
    facts = " · ".join(f"{escape(str(name))} {escape(_number(value))}" for name, value in (stats or {}).items())
    asked = f'<div class="seq prompt">{escape(prompt.strip(chr(10)))}</div>' if prompt.strip() else ""
    found = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)} <span class=stats>{facts}</span></summary>"
        f"{asked}{f'<ul class=problems>{found}</ul>' if found else ''}{_items(parse(text), 0)}{below}</details>"
    )


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document from fragments of HTML; `title` is plain text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _items(element: Element, depth: int) -> str:
    pieces = []
    for item in element.items:
        if isinstance(item, Block) and depth < _DEEP:
            pieces.append(_block(item, depth + 1))
        else:
            text = item if isinstance(item, str) else item.text
            if text.strip():
                pieces.append(f'<div class="seq">{escape(text.strip(chr(10)))}</div>')
    return "".join(pieces)


def _block(block: Block, depth: int) -> str:
    plans = {outline.number: outline.body.strip() for outline in block.outlines if outline.number is not None}
    lanes = []
    for thread in block.threads:
        plan = plans.get(thread.number or "", "")
        lanes.append(
            f'<div class="lane{"" if thread.closed else " open"}"><b>{escape(thread.number or "?")}</b> '
            f'<span class="plan">{escape(plan)}</span>{_items(thread, depth)}</div>'
        )
    summary = block.conclusion
    tail = f'<div class="seq">{escape(summary.text.strip())}</div>' if summary is not None else ""
    state = "" if block.closed else " open"
    return f'<div class="block{state}"><div class="lanes">{"".join(lanes)}</div>{tail}</div>'
