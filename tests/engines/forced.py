"""What engine tests share: a served model beside the same one in this process, and forks that are forced.

`Forced` makes any model fork: it writes the structure of a given text token by token, each token made certain by a
logit bias, and lets the model write freely in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tests.engines.models import Case
from tests.support.models import in_float64
from tw_core import ReasoningTrie, TagIds, Unit, encode_units
from tw_recipes import ForkJoinDecoder, OpenAIEngine, TransformersEngine, install, uninstall
from tw_recipes.decoding import GREEDY, Completion, Engine, Limits, Request, Rollout

FREE = 5


class Forced:
    """An engine that forks where `text` does, on top of another engine.

    Args:
        inner: Writes.
        text: Fork/join text; its first block is copied.
        tokenizer: Of the text.
        bias: Force tokens by calls with a logit bias; False puts them in place without a call.
    Attributes:
        free: For each call, by its context, which tokens the model chose.
    """

    def __init__(self, inner: Engine, text: str, tokenizer: Any, *, bias: bool) -> None:
        self.inner, self.bias = inner, bias
        self.eos_ids, self.max_context = inner.eos_ids, inner.max_context
        self.tags = TagIds.from_tokenizer(tokenizer)
        self.units = [unit.completion.tolist() for unit in encode_units(text, tokenizer)]
        self.free: dict[bytes, list[bool]] = {}

    def plan(self, request: Request) -> list[list[int] | int]:
        """Pieces of this call: ids to force, or a number of tokens to let the model choose."""
        opened = int(np.count_nonzero(request.context == self.tags.thread_open))
        closed = int(np.count_nonzero(request.context == self.tags.thread_close))
        if not opened:
            return [self.units[0]]
        if closed < opened:
            return [FREE, [self.tags.thread_close]]
        return [self.units[-1][:1], FREE, [self.eos_ids[0]]]

    async def generate(self, request: Request) -> Completion:
        """Writes the pieces one after another until one of them ends in a stop id."""
        ids, logprobs, free = list[int](), list[float](), list[bool]()

        async def write(most: int, token: int | None = None) -> bool:
            context = np.concatenate([request.context, np.array(ids, dtype=np.int64)])
            call = replace(request, context=context, max_tokens=most)
            if token is not None:
                call = replace(call, sampling=replace(request.sampling, logit_bias={token: 100.0}))
            if token is None or self.bias:
                done = await self.inner.generate(call)
            else:
                done = Completion(np.array([token]), np.zeros(1), "stop" if token in request.stop_ids else "length")
            assert token is None or done.ids.tolist() == [token], f"{token} was forced, got {done.ids}"
            ids.extend(done.ids.tolist())
            logprobs.extend(done.logprobs.tolist())
            free.extend([token is None] * len(done.ids))
            return done.finish == "stop"

        ended = False
        for piece in self.plan(request):
            pieces = [(piece, None)] if isinstance(piece, int) else [(1, token) for token in piece]
            for most, token in pieces:
                ended = ended or await write(most, token)
        self.free[request.context.tobytes()] = free
        return Completion(np.array(ids), np.array(logprobs), "stop" if ended else "length")

    async def aclose(self) -> None:
        """Closes what writes."""
        await self.inner.aclose()


@dataclass
class Bench:
    """One model on a server and in this process."""

    case: Case
    server: Any
    model: Any
    tokenizer: Any
    limits: Limits = field(default_factory=lambda: Limits(max_total_tokens=400))

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prompts(self) -> list[list[int]]:
        return [self.tokenizer.encode(text) for text in self.case.prompts]

    def remote(self, **options: Any) -> OpenAIEngine:
        return OpenAIEngine(self.server.url, self.server.model, self.tokenizer, **options)

    def local(self) -> TransformersEngine:
        return TransformersEngine(self.model, eos_ids=[self.eos])

    def decode(self, engine: Engine, prompts: Sequence[Any], sampling: Any = GREEDY, **options: Any) -> list[Rollout]:
        limits = options.pop("limits", self.limits)
        decoder = ForkJoinDecoder(engine, TagIds.from_tokenizer(self.tokenizer), limits, sampling, **options)
        return decoder.decode_all(prompts)

    @cached_property
    def exact_model(self) -> Any:
        return in_float64(self.model)

    def exact_logprobs(self, units: list[Unit], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probs of each unit's completion, in float64, from one pass over the packed trie of all units."""
        packed = ReasoningTrie.from_units(units).pack()
        install(self.exact_model)
        try:
            with torch.no_grad():
                logits = self.exact_model(
                    input_ids=packed.input_ids[None],
                    position_ids=packed.position_ids[None],
                    subtree_end=packed.subtree_end[None],
                    use_cache=False,
                ).logits[0]
        finally:
            uninstall(self.exact_model)
        every = torch.log_softmax(logits / temperature, -1)
        found = []
        for place, unit in enumerate(units):
            rows = packed.sequence_rows(place)[len(unit.context) - 1 : -1]
            found.append(every[rows, torch.from_numpy(np.asarray(unit.completion))].numpy())
        return found

    def missed(self, rollouts: Sequence[Rollout], temperature: float = 1.0) -> np.ndarray:
        """How far each written token's log-prob is from the exact one. Shape (tokens of all rollouts,)."""
        pairs = [
            np.abs(np.concatenate(one.logprobs) - np.concatenate(self.exact_logprobs(one.units, temperature)))
            for one in rollouts
        ]
        return np.concatenate(pairs)
