r"""`threadweaver view`: files of trajectories as one self-contained HTML page, threads side by side.

    threadweaver view trajectories.jsonl --out page.html
    threadweaver view out/quickstart --tokenizer out/quickstart/forkjoin

Exit status: 0 written, 1 bad input, 2 wrong flags. Guarded by tests/recipes/viewer/test_view.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tyro

from tw_core import TagIds
from tw_core.errors import ThreadWeaverError
from tw_recipes.data import BadRow, require_local
from tw_recipes.viewer.drawing import draw_trie
from tw_recipes.viewer.entries import Entry, read_entries, trajectory_files
from tw_recipes.viewer.html import page, trajectory_html
from tw_recipes.viewer.measures import Measures, measure
from tw_recipes.viewer.summary import summarize
from tw_recipes.viewer.timeline import timeline_svg


@dataclass(frozen=True)
class ViewOptions:
    """Show trajectories as an HTML page without script or network.

    Attributes:
        path: A .jsonl, .parquet or .txt file of trajectories, or a folder of such files.
        out: The page. Defaults to the file with the suffix .html, or view.html in the folder.
        tokenizer: Folder or Hub name of a tokenizer with the tags: for rows of ids, and to count tokens of text.
        limit: Trajectories shown of each file.
        skip_bad: Leave bad rows out and list them, instead of stopping at the first.
    """

    path: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    tokenizer: str | None = None
    limit: int = 50
    skip_bad: bool = False


def write_view(options: ViewOptions) -> Path:
    """What `threadweaver view` does; returns the path of the page.

    Raises:
        FileNotFoundError: There is no such file.
        RowReadError: A row is bad and `skip_bad` is off.
        ValueError: Nothing can be shown, or `limit` is not positive.
    """
    if options.limit < 1:
        raise ValueError(f"limit must be at least 1, got {options.limit}")
    files = trajectory_files(options.path)
    folder = options.path.is_dir()
    out = options.out or (options.path / "view.html" if folder else options.path.with_suffix(".html"))
    tokenizer, tags = load_tokenizer(options.tokenizer)
    parts = []
    for file in files:
        name = str(file.relative_to(options.path)) if folder else file.name
        parts.append(f"<h2>{escape(name)}</h2>{_section(file, options, tokenizer, tags)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(f"Trajectories of {options.path.name or options.path}", parts), encoding="utf-8")
    return out


def load_tokenizer(name: str | None) -> tuple[Any, TagIds | None]:
    """The tokenizer and its tags; None and None without a name."""
    if name is None:
        return None, None
    from transformers import AutoTokenizer

    require_local("tokenizer", name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    return tokenizer, TagIds.from_tokenizer(tokenizer)


def _section(file: Path, options: ViewOptions, tokenizer: Any, tags: TagIds | None) -> str:
    skipped: list[BadRow] = []
    entries = read_entries(file, tokenizer=tokenizer, skipped=skipped if options.skip_bad else None)
    shown = [(entry, measure(entry, tokenizer, tags)) for entry in islice(entries, options.limit)]
    for entry, _ in shown:
        if entry.text is None:
            raise ValueError(f"{file}, trajectory {entry.name!r} holds ids alone; pass --tokenizer to see their text")
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in
                   summarize(found for _, found in shown).lines())  # fmt: skip
    notes = [f"The first {options.limit} trajectories of the file."] if next(entries, None) is not None else []
    notes += [f"left out: {bad}" for bad in skipped]
    said = "".join(f"<p class=stats>{escape(note)}</p>" for note in notes)
    bodies = [_trajectory(entry, found, place == 0) for place, (entry, found) in enumerate(shown)]
    return f"{said}<table>{rows}</table>{''.join(bodies)}"


def _trajectory(entry: Entry, found: Measures, opened: bool) -> str:
    assert entry.text is not None
    below = timeline_svg(entry.row.get("calls") or ())
    if found.trie is not None:
        below += f"<pre>{escape(draw_trie(found.trie))}</pre>"
    return trajectory_html(
        entry.text,
        title=_title(entry),
        stats=found.shown() | ({} if found.well_formed else {"format": f"{len(found.problems)} problems"}),
        opened=opened,
        prompt=entry.prompt,
        problems=found.problems,
        below=below,
    )


def _title(entry: Entry) -> str:
    asked = " ".join(entry.prompt.split())
    return f"{entry.name}: {asked if len(asked) <= 80 else asked[:77] + '...'}"


def main(argv: Sequence[str]) -> int:
    """Parse flags, write the page, print its path; the result is the exit status."""
    options = tyro.cli(ViewOptions, args=list(argv), prog="threadweaver view")
    try:
        print(write_view(options))
    except (ThreadWeaverError, OSError, ValueError) as error:
        print(f"threadweaver view: {error}", file=sys.stderr)
        return 1
    return 0
