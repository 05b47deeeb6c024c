"""Thresholds of the stages: what a step, a block, an edit, an outline and a sample must keep to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageOptions:
    """Thresholds; lengths are characters.

    Attributes:
        tries: Replies the annotator may give to one question; each after the first is told what was wrong.
        max_reply_tokens: Tokens of a reply.
        min_lines: Traces with fewer lines are left out.
        max_trace_chars: Longer traces are left out.
        max_threads: Threads of a block.
        min_saving: What a block must save: the sum of its threads less the longest one.
        max_edit_chars: Characters that one edit may change.
        max_edit_growth: Characters that one edit may add on balance; edits remove references, they tell nothing new.
        max_edit_ratio: Share of a thread that edits may change.
        max_outline_chars: Length of an outline.
        max_shared_numbers: Share of a thread's own numbers (two digits or more, found nowhere before the block) that
            a sibling may hold too; three are always allowed.
        max_shared_words: Share of a thread's runs of eight words that a sibling may hold too.
        min_acceleration: What the blocks of a sample must gain: 1 - critical path / length.
    """

    tries: int = 2
    max_reply_tokens: int = 8192
    min_lines: int = 4
    max_trace_chars: int = 200_000
    max_threads: int = 16
    min_saving: int = 200
    max_edit_chars: int = 200
    max_edit_growth: int = 40
    max_edit_ratio: float = 0.3
    max_outline_chars: int = 300
    max_shared_numbers: float = 0.5
    max_shared_words: float = 0.5
    min_acceleration: float = 0.05

    def __post_init__(self) -> None:
        for name in ("tries", "max_reply_tokens", "min_lines", "max_trace_chars", "max_outline_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_threads < 2:
            raise ValueError(f"max_threads must be at least 2, got {self.max_threads}")
        for name in ("max_edit_ratio", "max_shared_numbers", "max_shared_words", "min_acceleration"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share in [0, 1], got {getattr(self, name)}")
        for name in ("min_saving", "max_edit_chars", "max_edit_growth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
