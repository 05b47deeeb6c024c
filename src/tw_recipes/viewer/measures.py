"""What can be said about one trajectory of a file: format, length, critical path, trie.

Recorded figures (the "stats" of a rollout) are taken as they are; the others are measured, where a tokenizer is needed
only if there is one. Guarded by tests/recipes/viewer/test_measures.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tw_core import (
    GrammarError,
    ReasoningTrie,
    TagIds,
    check_format,
    encode_units,
    extract_units,
    parallel_stats,
    parse,
)
from tw_core.errors import ThreadWeaverError
from tw_recipes.sft.rows import row_to_trie
from tw_recipes.viewer.entries import Entry, joined_ids


class Measures(NamedTuple):
    """Measures of one trajectory; None where the file and the tokenizer do not tell.

    Attributes:
        problems: Departures from the format, each with its place ("character 12", "token 7").
        well_formed: Whether there is none and no closer was forced; None for a row without text.
        status: Of a rollout: done, length, error or cancelled, with the reason.
        total_tokens: T.
        token_latency: L, of a rollout that of the calls that ran.
        blocks: Blocks; of a rollout those that ran at once.
        threads: Threads, likewise.
        trie: Its trie, as it would be trained.
        no_trie: Why there is none.
        scores: What reinforcement learning gave it: each reward by name, and its advantage.
    """

    problems: tuple[str, ...]
    well_formed: bool | None
    status: str | None
    total_tokens: int | None
    token_latency: int | None
    blocks: int | None
    threads: int | None
    trie: ReasoningTrie | None
    no_trie: str
    scores: Mapping[str, float]

    @property
    def acceleration(self) -> float | None:
        """1 - L / T."""
        if self.total_tokens is None or self.token_latency is None:
            return None
        return 1 - self.token_latency / self.total_tokens if self.total_tokens else 0.0

    def shown(self) -> dict[str, Any]:
        """The figures by the names of SPEC section 5, then the scores, without the unknown ones."""
        trie = self.trie
        found = {
            "status": self.status,
            "T": self.total_tokens,
            "L": self.token_latency,
            "acceleration": self.acceleration,
            "blocks": self.blocks,
            "threads": self.threads,
            "rows": None if trie is None else trie.num_tokens,
            "r": None if trie is None else trie.sharing_ratio,
        }
        return {name: value for name, value in [*found.items(), *self.scores.items()] if value is not None}


def measure(entry: Entry, tokenizer: Any = None, tags: TagIds | None = None) -> Measures:
    """Measure one trajectory.

    Args:
        entry: Of `read_entries`.
        tokenizer: Its tags single tokens; gives text its tokens.
        tags: `TagIds.from_tokenizer(tokenizer)`, made once for a file.
    """
    problems, well_formed = _format(entry)
    figures = _recorded(entry.row) or _counted(entry, tokenizer, tags)
    trie, no_trie = _trie(entry, tokenizer, tags)
    status = None
    if isinstance(entry.row.get("status"), str):
        reason = entry.row.get("reason")
        status = f"{entry.row['status']}: {reason}" if reason else entry.row["status"]
    rewards = entry.row.get("rewards")
    scores = dict(rewards) if isinstance(rewards, Mapping) else {}
    if entry.row.get("advantage") is not None:
        scores["advantage"] = entry.row["advantage"]
    return Measures(problems, well_formed, status, *figures, trie, no_trie, scores)


def _format(entry: Entry) -> tuple[tuple[str, ...], bool | None]:
    recorded = entry.row.get("problems")
    if isinstance(recorded, list) and isinstance(entry.row.get("format_ok"), bool):
        count = entry.row.get("forced")
        forced = [f"closers that the decoder had to add: {count}"] if count else []
        return (*(f"token {at}: {message}" for at, _, message in recorded), *forced), entry.row["format_ok"]
    if entry.text is None:
        return (), None
    found = check_format(entry.text).problems
    return tuple(f"character {p.offset}: expected {p.expected}, found {p.found}" for p in found), not found


def _recorded(row: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    stats = row.get("stats")
    if not isinstance(stats, Mapping) or "total_tokens" not in stats:
        return None
    latency = row.get("token_latency", stats.get("critical_path_tokens"))
    blocks, threads = row.get("forks", stats.get("num_blocks")), row.get("forked_threads", stats.get("num_threads"))
    return stats["total_tokens"], latency, blocks, threads


def _counted(entry: Entry, tokenizer: Any, tags: TagIds | None) -> tuple[int | None, ...]:
    text = entry.text
    if text is None:
        return None, None, None, None
    if tags is not None:
        found = joined_ids(entry.row)
        cut_off = found is not None and entry.row.get("ids") is None and parse(text).open_elements
        if found is None:
            found = _response_ids(text, tokenizer, tags), 0
        if not cut_off:  # the last call of a trajectory that ends inside a block has not seen the other threads
            stats = parallel_stats(found[0], tags, prompt_length=found[1])
            return stats.total_tokens, stats.critical_path_tokens, stats.num_blocks, stats.num_threads
    return None, None, *_structure(parse(text))


def _response_ids(text: str, tokenizer: Any, tags: TagIds) -> np.ndarray:
    """Tokenised at inference's seams where the text is well-formed, else in one piece."""
    try:
        last = encode_units(text, tokenizer, tag_ids=tags)[-1]
    except (GrammarError, IndexError):
        return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    return np.concatenate(list(last))


def _structure(element: Any) -> tuple[int, int]:
    """Blocks and threads at any depth, without recursion: text may nest deeper than Python's stack."""
    blocks, threads, waiting = 0, 0, [element]
    while waiting:
        for block in waiting.pop().blocks:
            blocks, threads = blocks + 1, threads + len(block.threads)
            waiting += block.threads
    return blocks, threads


def _trie(entry: Entry, tokenizer: Any, tags: TagIds | None) -> tuple[ReasoningTrie | None, str]:
    row = entry.row or {"prompt": "", "text": entry.text}
    try:
        if row.get("units") is None and row.get("ids") is not None:
            if tags is None:
                return None, "a rollout without units needs --tokenizer"
            return ReasoningTrie.from_units(extract_units(row["ids"], tags, row["prompt_length"])), ""
        forms = ("units", "sequences", "messages")
        if not any(row.get(form) is not None for form in forms):
            row = {"prompt": entry.prompt, "text": entry.text}
        if tokenizer is None and row.get("units") is None and row.get("sequences") is None:
            return None, "text needs --tokenizer"
        return row_to_trie(row, tokenizer), ""
    except ThreadWeaverError as error:
        return None, str(error)
