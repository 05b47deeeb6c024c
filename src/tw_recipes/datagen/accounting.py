"""Calls, tokens and money by question and model, and the trace of every call.

The trace is one JSON line a call; it holds the messages, the reply and the usage, and never a header or a key. The
accounts of a job that goes on are read back from it.
Guarded by tests/recipes/datagen/test_annotator.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tw_recipes.datagen.llm import LLMReply, LLMRequest, Models


@dataclass
class Usage:
    """What calls have taken.

    Attributes:
        calls: Replies that came.
        failed: Attempts without a reply.
        prompt_tokens: Of the replies' prompts.
        completion_tokens: Of the replies.
        cost: In the currency of the prices.
        seconds: Sum of the calls' durations.
    """

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Usage") -> None:
        """Count another one in."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def tokens(self) -> int:
        """Prompt and reply."""
        return self.prompt_tokens + self.completion_tokens


class Accounts:
    """Usage by (question, model), and the file of calls.

    Args:
        path: The trace, appended to; what it holds is counted in. None keeps no trace.
        models: Prices.
    """

    def __init__(self, path: Path | None, models: Models) -> None:
        self.models = models
        self.usage: dict[tuple[str, str], Usage] = {}
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                for line in read_calls(path):
                    self._book(line["question"], line["model"], Usage(**line["usage"]))
            self._file = path.open("a", encoding="utf-8")

    def replied(self, request: LLMRequest, reply: LLMReply, seconds: float) -> Usage:
        """Book a reply and write it down."""
        cost = self.models.cost(request.model, reply.prompt_tokens, reply.completion_tokens)
        usage = Usage(1, 0, reply.prompt_tokens, reply.completion_tokens, cost, round(seconds, 4))
        self._write(request, usage, {"reply": reply.text, "finish": reply.finish})
        return usage

    def failed(self, request: LLMRequest, error: str, seconds: float) -> None:
        """Book an attempt that brought no reply."""
        self._write(request, Usage(failed=1, seconds=round(seconds, 4)), {"error": error})

    @property
    def total(self) -> Usage:
        """All of it."""
        total = Usage()
        for usage in self.usage.values():
            total.add(usage)
        return total

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, request: LLMRequest, usage: Usage, said: Mapping[str, Any]) -> None:
        self._book(request.question, request.model, usage)
        if self._file is None:
            return
        line = {
            "key": request.key,
            "question": request.question,
            "model": request.model,
            "messages": list(request.messages),
            **said,
            "usage": vars(usage),
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def _book(self, question: str, model: str, usage: Usage) -> None:
        self.usage.setdefault((question, model), Usage()).add(usage)


def read_calls(path: Path) -> Any:
    """The lines of a trace; a half-written last one (after a kill) is cut off the file."""
    good = 0
    with path.open("rb") as file:
        for data in file:
            if not data.endswith(b"\n"):
                break
            good += len(data)
            yield json.loads(data)
    if good != path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(good)
