r"""`threadweaver inspect`: what a file of trajectories holds, or one trajectory of it, in the terminal.

    threadweaver inspect train.jsonl --tokenizer out/sft                 figures and format problems of all rows
    threadweaver inspect trajectories.jsonl --key 3#0                    one trajectory: blocks, problems, its trie

Exit status: 0 read, 1 bad input, 2 wrong flags. Guarded by tests/recipes/viewer/test_inspect.py.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tw_core import TagIds, parse
from tw_core.errors import ThreadWeaverError
from tw_core.grammar import Element, Thread
from tw_recipes.data import BadRow
from tw_recipes.viewer.drawing import draw_trie
from tw_recipes.viewer.entries import Entry, read_entries
from tw_recipes.viewer.measures import Measures, measure
from tw_recipes.viewer.summary import Summary
from tw_recipes.viewer.view import load_tokenizer


@dataclass(frozen=True)
class InspectOptions:
    """Report on trajectories in the terminal.

    Attributes:
        path: A .jsonl or .parquet file of trajectories, or a .txt file that is one.
        key: Name of one trajectory: its "key" or "id" column, else its number from 1.
        tokenizer: Folder or Hub name of a tokenizer with the tags: for T, L and the tries of rows of text.
        problems: Format problems listed.
        skip_bad: Leave bad rows out and list them, instead of stopping at the first.
    """

    path: Annotated[Path, tyro.conf.Positional]
    key: str | None = None
    tokenizer: str | None = None
    problems: int = 20
    skip_bad: bool = False


def report(options: InspectOptions, width: int = 100) -> RenderableType:
    """What `threadweaver inspect` prints.

    Args:
        options: See there.
        width: Characters of the drawing of a trie.

    Raises:
        FileNotFoundError: There is no such file.
        RowReadError: A row is bad and `skip_bad` is off.
        ValueError: No trajectory is named `key`.
    """
    tokenizer, tags = load_tokenizer(options.tokenizer)
    skipped: list[BadRow] = []
    entries = read_entries(options.path, tokenizer=tokenizer, skipped=skipped if options.skip_bad else None)
    if options.key is not None:
        for entry in entries:
            if entry.name == options.key:
                return one(entry, measure(entry, tokenizer, tags), tokenizer, width)
        raise ValueError(f"key must name a trajectory of {options.path}, got {options.key!r}; it has none of that name")
    first = next(entries)
    second = next(entries, None)
    if second is None:
        return one(first, measure(first, tokenizer, tags), tokenizer, width)
    return _all(_chained(first, second, entries), skipped, options, tokenizer, tags)


def _chained(first: Entry, second: Entry, rest: Iterator[Entry]) -> Iterator[Entry]:
    yield first
    yield second
    yield from rest


def _all(
    entries: Iterator[Entry], skipped: list[BadRow], options: InspectOptions, tokenizer: Any, tags: TagIds | None
) -> RenderableType:
    """The report on a whole file."""
    summary, listed, unlisted = (
        Summary(),
        Table("trajectory", "problem", title="format problems", title_justify="left"),
        0,
    )
    for entry in entries:
        found = measure(entry, tokenizer, tags)
        summary.add(found)
        for problem in found.problems:
            if listed.row_count < options.problems:
                listed.add_row(Text(entry.name), Text(problem))
            else:
                unlisted += 1
    parts: list[RenderableType] = [_facts(str(options.path), summary.lines())]
    if listed.row_count:
        parts.append(listed)
    if unlisted:
        parts.append(Text(f"and {unlisted} more problems; --problems {unlisted + options.problems} lists all"))
    parts += [Text(f"left out: {bad}") for bad in skipped]
    return Group(*parts)


def one(entry: Entry, found: Measures, tokenizer: Any = None, width: int = 100) -> RenderableType:
    """The report on one trajectory: figures, blocks, format problems, the trie.

    Args:
        entry: Of `read_entries`.
        found: `measure(entry, ...)`.
        tokenizer: Gives the lengths of threads in tokens; else they are in characters.
        width: Characters of the drawing.
    """
    facts = [(name, f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value)
             for name, value in found.shown().items()]  # fmt: skip
    if found.well_formed is not None:
        facts.append(("format", "well-formed" if found.well_formed else f"{len(found.problems)} problems"))
    parts: list[RenderableType] = [_facts(f"{entry.name}: {entry.prompt}"[:width], facts)]
    parts += [Text(f"  {problem}") for problem in found.problems]
    if entry.text is not None:
        unit = "characters" if tokenizer is None else "tokens"
        blocks = Table("block", "thread", unit, "outline", title="blocks", title_justify="left")
        for row in _threads(parse(entry.text), tokenizer):
            blocks.add_row(*map(Text, row))
        if blocks.row_count:
            parts.append(blocks)
    if found.trie is None:
        parts.append(Text(f"no trie: {found.no_trie}"))
    else:
        trie = found.trie
        shares = f"{trie.num_expanded_tokens:,} tokens of {trie.num_sequences} sequences in {trie.num_tokens:,} rows"
        parts.append(Text(f"trie: {shares}; # trained, . context, + one of several branches"))
        parts.append(Text(draw_trie(trie, width=width), no_wrap=True))
    return Group(*parts)


def _threads(root: Element, tokenizer: Any) -> Iterator[tuple[str, str, str, str]]:
    """(block, thread, length, outline) of each thread, nested ones below the thread that holds them."""
    waiting = _own_threads(root, "")  # without recursion: text may nest deeper than Python's stack
    while waiting:
        name, plan, thread = waiting.pop()
        text, number = thread.text, thread.number or "?"
        length = len(text) if tokenizer is None else len(tokenizer.encode(text, add_special_tokens=False))
        yield name, f"{number}{'' if thread.closed else ' (not closed)'}", f"{length:,}", plan
        waiting += _own_threads(thread, f"{name}.{number}.")


def _own_threads(element: Any, above: str) -> list[tuple[str, str, Thread]]:
    """(block, outline, thread) of the threads directly in an element, the last one first."""
    found = []
    for place, block in enumerate(element.blocks, 1):
        plans = {outline.number: outline.body.strip() for outline in block.outlines}
        found += [(f"{above}{place}", plans.get(thread.number, ""), thread) for thread in block.threads]
    return found[::-1]


def _facts(title: str, lines: Sequence[tuple[str, str]]) -> RenderableType:
    table = Table(show_header=False)
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return Group(Text(title, style="bold"), table)


def main(argv: Sequence[str]) -> int:
    """Parse flags, print the report; the result is the exit status."""
    options = tyro.cli(InspectOptions, args=list(argv), prog="threadweaver inspect")
    console = Console()
    try:
        console.print(report(options, max(console.width - 1, 60)))
    except (ThreadWeaverError, OSError, ValueError) as error:
        print(f"threadweaver inspect: {error}", file=sys.stderr)
        return 1
    return 0
