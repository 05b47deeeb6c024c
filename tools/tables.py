"""Keep the tables of README and docs equal to the committed results.

A table stands between two comments; the first says how it is made:

    <!-- table trie_attention-h100 rows=case cols=impl metric=fwd_ms digits=2 -->
    ...generated...
    <!-- /table -->

`rows` and `cols` name record fields (case, impl, metric); `metric`, `case`, `impl` keep the records with that value (or
one of several, separated by commas, in that order); `digits` rounds. A missing results file or an empty table is an
error.

    python tools/tables.py          exits 1 and names every stale table
    python tools/tables.py --fix    rewrites them
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table (?P<spec>[^>]*?) -->\n).*?(<!-- /table -->)", re.DOTALL)
FIELDS = ("case", "impl", "metric")


def render_table(spec: str, results: Path) -> str:
    """The Markdown of one table from its comment's words."""
    name, *words = spec.split()
    options = dict(word.split("=", 1) for word in words)
    records = json.loads((results / f"{name}.json").read_text())["records"]
    rows, cols, digits = options.pop("rows", "case"), options.pop("cols", "impl"), int(options.pop("digits", 2))
    keep = {field: value.split(",") for field, value in options.items()}
    if unknown := set(keep) - set(FIELDS) or {rows, cols} - set(FIELDS):
        raise ValueError(f"{spec!r} has unknown words {sorted(unknown)}; use rows, cols, digits, {', '.join(FIELDS)}")
    cells = {}
    for record in records:
        if all(record[field] in values for field, values in keep.items()):
            value = record["value"]
            text = f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)
            cells[record[rows], record[cols]] = text
    if not cells:
        raise ValueError(f"table {spec!r}: no record of {name}.json matches")

    def order(field: str, axis: int) -> list[str]:
        seen = list(dict.fromkeys(key[axis] for key in cells))
        return [v for v in keep[field] if v in seen] if field in keep else seen

    columns = order(cols, 1)
    lines = [f"| {rows} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {r} | " + " | ".join(cells.get((r, c), "") for c in columns) + " |" for r in order(rows, 0)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check or rewrite every table; the exit status counts as the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="rewrite stale tables")
    args = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        fresh = TABLE.sub(lambda m: m[1] + render_table(m["spec"], ROOT / "benchmarks" / "results") + m[3], text)
        if fresh != text:
            stale.append(path.relative_to(ROOT))
            if args.fix:
                path.write_text(fresh)
    for path in stale:
        print(f"{'rewrote' if args.fix else 'stale table in'} {path}")
    if stale and not args.fix:
        print("run `make docs FIX=1` and commit the result")
    return int(bool(stale) and not args.fix)


if __name__ == "__main__":
    sys.exit(main())
