"""A model that writes a given trajectory: random weights and full work, but the next token is decided by the position.

In a trajectory of equal threads the position alone says what comes next: the threads of a block stand at the same
positions, and what follows the join at later ones. So a hook on the logits makes any causal model fork where the plan
says, through any engine, with caches and batching as they are. Prompts must have `plan.prompt_tokens` tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tw_core import TAGS, TagIds

EOS, NEWLINE, COLON, WORD = 11, 12, 13, 40
TAG_IDS = TagIds.from_mapping(
    {tag: place for place, tag in enumerate(TAGS, 1)}, newline=NEWLINE, colon=COLON, digits=range(20, 30)
)


@dataclass(frozen=True)
class Plan:
    """The shape of a response: text, one block of equal threads, text, end of the sequence.

    Attributes:
        prompt_tokens: Tokens of every prompt.
        before: Words before the block.
        threads: Threads, at most 9.
        words: Words of each thread.
        after: Words after the block.
    """

    prompt_tokens: int = 128
    before: int = 16
    threads: int = 4
    words: int = 40
    after: int = 16

    def opening(self) -> list[int]:
        """The first call."""
        t = TAG_IDS
        outlines = [
            id_
            for number in range(1, self.threads + 1)
            for id_ in (t.outline_open, *t.label(str(number))[1:], WORD, t.outline_close)
        ]
        return [WORD] * self.before + [t.parallel_open, t.outlines_open, *outlines, t.outlines_close]

    def thread(self) -> list[int]:
        """The call of each thread."""
        return [WORD] * self.words + [TAG_IDS.thread_close]

    def closing(self) -> list[int]:
        """The call after the join."""
        return [TAG_IDS.parallel_close, *[WORD] * self.after, EOS]

    @property
    def generated(self) -> int:
        """Tokens that are written."""
        return len(self.opening()) + self.threads * len(self.thread()) + len(self.closing())

    def table(self, fork: bool) -> list[int]:
        """Position of a token -> the token after it; `fork=False` writes as many words in one call."""
        if not fork:
            return [WORD] * (self.prompt_tokens + self.generated - 2) + [EOS]
        header = len(TAG_IDS.thread_header("1", first=True))
        start = self.prompt_tokens + len(self.opening())
        joined = start + self.threads * (header + len(self.thread())) - (self.threads - 1) + 1
        table = [WORD] * (self.prompt_tokens - 1) + self.opening()
        table += [WORD] * (start + header - 1 - len(table)) + self.thread()
        return table + [WORD] * (joined - 1 - len(table)) + self.closing()


def force(model: Any, plan: Plan, *, fork: bool) -> Any:
    """Makes `model` write the plan; returns the hook's handle, whose `remove()` undoes it."""
    table = torch.tensor(plan.table(fork), device=model.device)

    def decide(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        positions: Tensor = kwargs["position_ids"]
        keep = kwargs.get("logits_to_keep", 0)
        if isinstance(keep, Tensor):
            positions = positions[:, keep]
        elif keep:
            positions = positions[:, -keep:]
        wanted = table[positions.clamp(max=len(table) - 1)]
        output.logits.scatter_(-1, wanted[..., None], 1e4)
        return output

    return model.register_forward_hook(decide, with_kwargs=True)
