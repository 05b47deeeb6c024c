"""Measures of one response: tokens, critical path, acceleration (SPEC section 5).

Tags alone count, wherever they can be structure (the tree of `scanner`), so a response that breaks the
format still has numbers; for flat trajectories they equal the recorded ones of the paper's code
(tests/core/test_stats.py).
"""

from typing import Any, NamedTuple

from tw_core._ids import as_ids
from tw_core.errors import TrieError
from tw_core.scanner import ROOT, id_tags, scan
from tw_core.tags import PARALLEL, THREAD, TagIds


class ParallelStats(NamedTuple):
    """Measures of one response, all in tokens of the response unless said.

    Attributes:
        total_tokens: T, all tokens.
        critical_path_tokens: L, tokens on the longest dependent chain: those outside threads, tags of
            threads included, plus for each block its longest thread. Nested blocks recurse.
        acceleration: 1 - L / T; 0 for an empty response.
        parallel_ratio: Share of T inside outermost blocks, their own two tags excluded.
        num_blocks: Blocks at any depth; an unclosed one counts.
        num_threads: Threads at any depth; an unclosed one counts.
        threads_per_block: num_threads / num_blocks; 0 without blocks.
        tokens_per_block: Mean tokens inside a block, its own two tags excluded; 0 without blocks.
        max_depth: Blocks around the most deeply nested thread or block, 1 for a flat trajectory, 0 without.
    """

    total_tokens: int
    critical_path_tokens: int
    acceleration: float
    parallel_ratio: float
    num_blocks: int
    num_threads: int
    threads_per_block: float
    tokens_per_block: float
    max_depth: int

    @property
    def with_parallel(self) -> bool:
        """Whether the response opens a block; its mean over responses is the activation ratio."""
        return self.num_blocks > 0


def parallel_stats(token_ids: Any, tag_ids: TagIds, *, prompt_length: int = 0, nested: bool = True) -> ParallelStats:
    """Measures one response in one pass over its tags.

    Args:
        token_ids: Shape (L,). The response, or prompt and response with `prompt_length`.
        tag_ids: The tags; glue is not needed.
        prompt_length: Tokens at the head that are not counted and hold no structure.
        nested: Whether a block may stand in a thread (False: the paper's flat format).
    Returns:
        `ParallelStats` of the response.
    Raises:
        TrieError: Ids that are negative or no integers, `prompt_length` outside 0..L.
    Source:
        arXiv:2512.07843, section on the acceleration reward; SPEC section 5.
    """
    ids = as_ids(token_ids, "token_ids")
    if not 0 <= prompt_length <= len(ids):
        raise TrieError(f"prompt_length must be within 0..{len(ids)} (the length of token_ids), got {prompt_length}")
    spans = list(scan(id_tags(ids, tag_ids, prompt_length), prompt_length, len(ids), nested=nested).walk())
    critical: dict[int, int] = {}  # id(span) -> L of its body
    inside, blocks, threads, deepest, depth = 0, 0, 0, 0, {id(spans[0]): 0}
    for span in spans:
        for child in span.children:
            depth[id(child)] = depth[id(span)] + (child.kind == PARALLEL)
    for span in reversed(spans):  # children before their parents
        length = span.body_end - span.body
        if span.kind in (ROOT, THREAD):
            length -= sum(critical[id(block)] for block in span.children)
            critical[id(span)] = length
        elif span.kind == PARALLEL:
            # What running the threads at once saves.
            found = span.of(THREAD)
            bodies = [thread.body_end - thread.body for thread in found]
            critical[id(span)] = sum(bodies) - max((critical[id(thread)] for thread in found), default=0)
            inside, blocks, threads = inside + length, blocks + 1, threads + len(found)
            deepest = max(deepest, depth[id(span)])
    total = len(ids) - prompt_length
    outermost = sum(block.body_end - block.body for block in spans[0].children)
    path = critical[id(spans[0])]
    return ParallelStats(
        total_tokens=total,
        critical_path_tokens=path,
        acceleration=1 - path / total if total else 0.0,
        parallel_ratio=outermost / total if total else 0.0,
        num_blocks=blocks,
        num_threads=threads,
        threads_per_block=threads / blocks if blocks else 0.0,
        tokens_per_block=inside / blocks if blocks else 0.0,
        max_depth=deepest,
    )
