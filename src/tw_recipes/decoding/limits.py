"""Budgets of one trajectory, each of them reported when it bites (`Rollout.limits_hit`).

Tests: tests/recipes/decoding/test_limits.py.
"""

from dataclasses import dataclass, fields, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a trajectory may go.

    Attributes:
        max_total_tokens: Tokens of the response, injected glue included. At a fork the rest is shared equally
            among the threads, so a result never depends on which thread was faster. The engine's context length
            bounds it too. Closers that finish a cut response come on top.
        max_thread_tokens: Tokens of one thread, its nested blocks included.
        max_blocks: Blocks one after another in one stream (the response, or one thread). After the last one
            the stream goes on without forking: </Outlines> no longer stops a call, and each fork that the model
            would have made counts as a hit. 0: never fork.
        max_threads: Threads of one block; further outlines get no thread.
        max_depth: Nesting. 0: never fork; 1: the paper's flat format; n: threads fork down to level n. Hits are
            counted as for `max_blocks`.
        max_seconds: Wall-clock time of a trajectory, None for no bound; what is in flight then is dropped.
    """

    max_total_tokens: int = 32_768
    max_thread_tokens: int = 16_384
    max_blocks: int = 64
    max_threads: int = 16
    max_depth: int = 4
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        least = {"max_total_tokens": 1, "max_thread_tokens": 1, "max_blocks": 0, "max_threads": 1, "max_depth": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"{name} must be >= {low}, got {value}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be > 0 or None, got {self.max_seconds}")

    @property
    def forks(self) -> bool:
        """Whether a trajectory may fork at all."""
        return self.max_blocks > 0 and self.max_depth > 0

    def sequential(self) -> Self:
        """The same budgets without forking: one call to the end, the baseline."""
        return replace(self, max_depth=0)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names that can stand in `Rollout.limits_hit`: the fields, and the engine's "max_context"."""
        return (*(field.name for field in fields(cls)), "max_context")
