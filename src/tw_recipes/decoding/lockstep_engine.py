"""A transformers model as an engine that gives the same tokens every time: calls run in waves, in lockstep.

    calls that wait ──► one left-padded batch ──► a token for every call at each step; finished calls leave ──► results

All calls that are waiting when the model is idle form a wave. Every call draws from its own generator (its seed), so
that a trajectory does not depend on what runs beside it; there is no thread and no clock. For tiny models on a CPU this
is several times faster than continuous batching, and the same seed gives the same rollouts again, after a restart too.
On a GPU the steps of a wave are replayed as CUDA graphs (fixed_step.py). A wave computes each context anew: for large
models with long shared prefixes use `TransformersEngine` or a server.

Tests: tests/recipes/decoding/test_lockstep_engine.py, test_fixed_step.py.
"""

import asyncio
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from tw_recipes import _compat
from tw_recipes.attention import native_attention
from tw_recipes.decoding import fixed_step
from tw_recipes.decoding.autocast import without_autocast
from tw_recipes.decoding.engine import Completion, Request, Sampling
from tw_recipes.decoding.fixed_step import FixedStep, FixedSteps
from tw_recipes.decoding.waves import WaveEngine
from tw_recipes.support import unwrap


class LockstepEngine(WaveEngine):
    """Runs requests on a transformers model, wave by wave.

    Args:
        model: A causal language model, plain, wrapped by PEFT, or with trie attention installed.
        eos_ids: Ids that end a sequence.
        max_context: Defaults to the config's max_position_embeddings.
        max_batch: The most calls of one batch; a larger wave is cut.
        cuda_graphs: Replay steps as CUDA graphs where that is possible: on a CUDA device, with full attention by SDPA
            in every layer. Other models run step by step.

    Raises:
        ValueError: `eos_ids` is empty or `max_batch` not positive.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: list[int] | tuple[int, ...],
        max_context: int | None = None,
        max_batch: int = 512,
        cuda_graphs: bool = True,
    ) -> None:
        _compat.require("transformers")
        self.model: PreTrainedModel = unwrap(model)
        config = self.model.config.get_text_config()
        max_context = max_context or getattr(config, "max_position_embeddings", None)
        self.cuda_graphs = cuda_graphs
        self._fixed: FixedSteps | None = None
        super().__init__(eos_ids, self.model.get_input_embeddings().num_embeddings, max_context, max_batch)

    async def _complete(self, requests: list[Request]) -> list[Completion]:
        was_training = self.model.training
        try:
            self.model.eval()
            with torch.no_grad(), native_attention(self.model), without_autocast(self.model):
                fixed = None
                if self.cuda_graphs and fixed_step.fits(self.model):
                    fixed = self._fixed = self._fixed or FixedSteps(self.model)
                batch = _Wave(self.model, requests, self.eos_ids[0], fixed)
                while batch.rows:
                    batch.step()
                    await asyncio.sleep(0)
        finally:
            self.model.train(was_training)
        return [batch.completion(place) for place in range(len(requests))]

    async def aclose(self) -> None:
        """Frees the buffers of CUDA graphs; the next call makes them anew."""
        self._fixed = None


class _Wave:
    """One batch from its prefill to its last token. `rows` names the call of each row."""

    def __init__(self, model: PreTrainedModel, requests: list[Request], padding: int, fixed: FixedSteps | None) -> None:
        self.model, self.requests, self.fixed = model, requests, fixed
        device = model.device
        self.sampling: Sampling = requests[0].sampling
        self.filters = []
        if self.sampling.top_k:
            self.filters.append(TopKLogitsWarper(self.sampling.top_k))
        if self.sampling.top_p < 1:
            self.filters.append(TopPLogitsWarper(self.sampling.top_p))
        width = max(len(request.context) for request in requests)
        ids = np.full((len(requests), width), padding, dtype=np.int64)
        mask = np.zeros((len(requests), width), dtype=np.int64)
        for row, request in enumerate(requests):
            ids[row, width - len(request.context) :] = request.context
            mask[row, width - len(request.context) :] = 1
        self.ids = torch.from_numpy(ids).to(device)
        self.mask = torch.from_numpy(mask).to(device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=model.config)
        self.cache_name = _compat.cache_argument(model)
        self.next: FixedStep | None = None
        self.rows = list(range(len(requests)))
        self.writing = [True] * len(requests)
        self.draws = [_draws(request) for request in requests]
        self.written: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]

    def step(self) -> None:
        """One forward: a token for every call that is still writing."""
        logits = self._forward() if self.next is None else self.next(self.ids[:, 0])
        tokens, logprobs = self._draw(logits.float())
        for place, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if self.writing[place]:
                self.written[place].append(token)
                self.logprobs[place].append(logprob)
                request = self.requests[place]
                self.writing[place] = token not in request.stop_ids and len(self.written[place]) < request.max_tokens
        self.ids = tokens[:, None]
        if self.next is None:
            self.positions = self.positions[:, -1:] + 1
        keep = [row for row, place in enumerate(self.rows) if self.writing[place]]
        # Other shapes need another graph: there rows leave when half of them have finished.
        if len(keep) < len(self.rows) and (self.next is None or 2 * len(keep) <= len(self.rows)):
            self._keep(keep)
        if self.next is None:
            if self.rows and self.fixed is not None and fixed_step.holds(self.cache):
                self.next = self.fixed.begin(self.cache, self.mask, self.positions)
                self.cache = DynamicCache(config=self.model.config)  # its memory
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(keep), 1)], dim=1)

    def _forward(self) -> Tensor:
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _keep(self, keep: list[int]) -> None:
        rows = torch.tensor(keep, dtype=torch.int64, device=self.ids.device)
        self.rows = [self.rows[row] for row in keep]
        self.ids = self.ids[rows]
        if self.next is not None:
            self.next.keep(rows)
            return
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        if keep:
            self.cache.batch_select_indices(rows)

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and the log-probs of the distribution they were drawn from. (R, V) -> (R,), (R,)."""
        if self.sampling.greedy:
            tokens = logits.argmax(-1)
            return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        logits = logits / self.sampling.temperature
        for keep in self.filters:
            logits = keep(self.ids, logits)
        logprobs = logits.log_softmax(-1)
        uniform = torch.tensor([next(self.draws[place]) for place in self.rows], dtype=torch.float64)
        # The inverse of the distribution function needs one uniform number a token.
        steps = logprobs.double().exp().cumsum(-1)
        target = (uniform.to(steps.device) * steps[:, -1])[:, None]
        tokens = torch.searchsorted(steps, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def completion(self, place: int) -> Completion:
        """What call `place` wrote."""
        ids = np.array(self.written[place], dtype=np.int64)
        finish = "stop" if len(ids) and int(ids[-1]) in self.requests[place].stop_ids else "length"
        return Completion(ids, np.array(self.logprobs[place], dtype=np.float64), finish)


def _draws(request: Request) -> Any:
    """Uniform numbers in [0, 1) of one call, without end."""
    generator = np.random.default_rng(request.seed)
    while True:
        yield from generator.random(256).tolist()
