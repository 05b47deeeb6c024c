"""A transformers model as an engine, in this process: continuous batching with shared prefix blocks.

    generate ──► manager thread (transformers' continuous batching) ──► completions, on CPU and GPU
    aclose   ──► manager stopped, attention restored, cache dropped: the model can be trained, and is started again
                 by the next call, so that new weights never meet an old cache

The paged cache shares prefixes block by block (`page_size` tokens), so a fork prefills little more than its header.
Log-probs are those of the distribution sampled from: equal to the model's at temperature 1 without top-p and top-k,
and in greedy decoding.

Tests: tests/recipes/decoding/test_transformers_engine.py.
"""

import asyncio
import itertools
import logging
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedModel

from tw_recipes import _compat
from tw_recipes.attention import native_attention
from tw_recipes.decoding.autocast import without_autocast
from tw_recipes.decoding.engine import Completion, EngineError, Request, Sampling
from tw_recipes.support import unwrap

# On a CPU the cache is sized by us: transformers would take most of the free memory.
_CPU_CACHE_GIB = 1.0
_CPU_CACHE_TOKENS = 32_768
_CPU_BATCH_TOKENS = 512
# Beside a cache of given size transformers would fill the GPU's memory with the attention mask of one forward.
_GPU_BATCH_TOKENS = 2_048


class TransformersEngine:
    """Runs requests on a transformers model by continuous batching.

    Calls of one event loop at a time; one `Sampling` at a time (another one waits for an idle engine).

    Args:
        model: A causal language model, plain, wrapped by PEFT, or with trie attention installed.
        eos_ids: Ids that end a sequence. Defaults to the model's generation config.
        max_context: The most tokens of context and completion. Defaults to the config's max_position_embeddings, and
            is never more than a given cache holds.
        page_size: Tokens of a cache page, the grain of prefix sharing. A multiple of 4.
        cache_tokens: Tokens the cache holds. Defaults to what fits 1 GiB (at most 32,768) on a CPU, and to
            `memory_share` of the free memory on a GPU.
        memory_share: Share of the free GPU memory for the cache; None lets transformers choose.
        max_batch_tokens: Tokens of one forward (prefill is split). Defaults to 512 on a CPU, and on a GPU to 2,048 with
            `cache_tokens`, else to transformers' choice.
        share_prefixes: Whether requests share cached blocks.
    Raises:
        ValueError: No end-of-sequence id is known.
        ImportError: transformers outside the tested range.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: list[int] | tuple[int, ...] | None = None,
        max_context: int | None = None,
        page_size: int = 32,
        cache_tokens: int | None = None,
        memory_share: float | None = None,
        max_batch_tokens: int | None = None,
        share_prefixes: bool = True,
    ) -> None:
        _compat.require("transformers")
        self.model: PreTrainedModel = unwrap(model)
        config = self.model.config.get_text_config()
        if eos_ids is None:
            known = self.model.generation_config.eos_token_id if self.model.generation_config else None
            known = config.eos_token_id if known is None else known
            eos_ids = [known] if isinstance(known, int) else known or []
        self.eos_ids = tuple(int(token) for token in eos_ids)
        if not self.eos_ids:
            raise ValueError(
                "eos_ids must hold at least one id: the model's configuration names none; pass eos_ids=[...]"
            )
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        self.page_size = page_size
        tokens = self._cpu_cache_tokens() if cache_tokens is None else cache_tokens
        self.cache_tokens = None if tokens is None else tokens // page_size * page_size
        # A request that the whole cache cannot hold would end the batch for all others.
        bounds = (max_context or getattr(config, "max_position_embeddings", None), self.cache_tokens)
        self.max_context = min((bound for bound in bounds if bound is not None), default=None)
        self.memory_share = memory_share
        self.max_batch_tokens = max_batch_tokens
        self.share_prefixes = share_prefixes
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._names = itertools.count()
        self._cached: dict[str, int] = {}
        self._running: _Running | None = None
        self._stopping: asyncio.Future[None] | None = None

    @property
    def cached_share(self) -> float:
        """Share of all context tokens so far that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    async def generate(self, request: Request) -> Completion:
        """Completes one context in the shared batch; cancelling the task takes it out of the batch.

        Raises:
            EngineError: The context holds ids outside the vocabulary or is too long, or generation failed. After a
                failure of the whole batch the next call starts a new one.
            ValueError: Sampling that continuous batching cannot do, or another one than the running batch has.
        """
        self._validate(request)
        while self._stopping is not None:
            await asyncio.wait([self._stopping])
        running = self._start(request.sampling, request.seed)
        manager, name = running.manager, f"call-{next(self._names)}"
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        seen = 0

        def deliver(output: Any) -> None:
            nonlocal seen
            if done.done():
                return
            try:
                if request.on_tokens is not None and len(output.generated_tokens) > seen:
                    request.on_tokens(output.generated_tokens[seen:])
                    seen = len(output.generated_tokens)
            except Exception as problem:  # the caller's: it must end this call, not be lost in the event loop
                manager.cancel_request(name)
                if not done.done():
                    done.set_exception(problem)
            else:
                if output.is_finished() and not done.done():  # `on_tokens` may have cancelled it
                    done.set_result(output)

        manager.register_result_handler(name, deliver)
        running.pending.add(done)
        try:
            accepted = manager.add_request(
                request.context.tolist(),
                request_id=name,
                max_new_tokens=request.max_tokens,
                eos_token_id=list(request.stop_ids),
                streaming=request.on_tokens is not None,
            )
            if accepted is None and not done.done():  # it has failed since `_start` looked
                done.cancel()
                return await self.generate(request)
            output = await done
        except asyncio.CancelledError:
            manager.cancel_request(name)
            raise
        finally:
            running.pending.discard(done)
            manager.output_router.result_handlers.pop(name, None)
            cached = min(self._cached.pop(name, 0), len(request.context))
        if output.error is not None:
            raise EngineError(f"generation failed: {output.error}")
        ids = np.array(output.generated_tokens, dtype=np.int64)
        self.prompt_tokens += len(request.context)
        self.cached_tokens += cached
        stopped = bool(len(ids)) and int(ids[-1]) in request.stop_ids
        logprobs = np.array(output.logprobs, dtype=np.float64)
        return Completion(ids, logprobs, "stop" if stopped else "length", cached_tokens=cached)

    async def aclose(self) -> None:
        """Stops the batch and gives the model back: its attention, its mode, the memory of the cache.

        Waits for the calls in flight; calls that come meanwhile wait for a new batch.
        """
        if self._stopping is not None:
            await asyncio.wait([self._stopping])
        running, self._running = self._running, None
        if running is None:
            return
        self._stopping = asyncio.ensure_future(asyncio.to_thread(running.stop))
        # By a callback: a cancelled `aclose` leaves the stop running, and no batch may start beside it.
        self._stopping.add_done_callback(self._stopped)
        await asyncio.shield(self._stopping)

    def _stopped(self, _done: "asyncio.Future[None]") -> None:
        self._stopping = None

    def _validate(self, request: Request) -> None:
        low, high = int(request.context.min()), int(request.context.max())
        if low < 0 or high >= self.vocab_size:
            raise EngineError(f"context ids must lie in 0..{self.vocab_size - 1}, got {low}..{high}")
        length = len(request.context) + request.max_tokens
        if self.max_context is not None and length > self.max_context:
            raise EngineError(
                f"context and max_tokens must fit {self.max_context} tokens, got {len(request.context)} + "
                f"{request.max_tokens}"
            )
        if request.sampling.logit_bias:
            raise ValueError("logit_bias is not possible with continuous batching; use OpenAIEngine with a server")

    def _start(self, sampling: Sampling, seed: int | None) -> "_Running":
        running = self._running
        if running is not None and running.ending:
            running.stop()
            running = None
        if running is not None and running.sampling != sampling:
            if running.pending:
                raise ValueError(
                    f"sampling must be that of the running batch ({running.sampling}), got {sampling}; "
                    "await the calls in flight first"
                )
            running.stop()
            running = None
        self._running = running or _Running(self, sampling, seed)
        self._running.loop = asyncio.get_running_loop()
        return self._running

    def _cpu_cache_tokens(self) -> int | None:
        """Tokens of the cache on a CPU, None on a GPU, where transformers asks for the free memory."""
        if self.model.device.type != "cpu":
            return None
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        return min(_CPU_CACHE_TOKENS, int(_CPU_CACHE_GIB * 2**30 / per_token))

    def _cache_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_batch_tokens": self.max_batch_tokens}
        if self.cache_tokens is not None:
            options["num_blocks"] = self.cache_tokens // self.page_size
            on_cpu = self.model.device.type == "cpu"
            options["max_batch_tokens"] = self.max_batch_tokens or (_CPU_BATCH_TOKENS if on_cpu else _GPU_BATCH_TOKENS)
        if self.memory_share is not None:
            options["max_memory_percent"] = self.memory_share
        return options


class _Running:
    """A started manager, the calls that wait for it, and how to undo it."""

    def __init__(self, engine: TransformersEngine, sampling: Sampling, seed: int | None) -> None:
        self.sampling = sampling
        self.model, self.undo = engine.model, ExitStack()
        self.was_training = self.model.training
        self.loop = asyncio.get_running_loop()
        self.pending: set[asyncio.Future[Any]] = set()
        drawn: dict[str, Any] = {}
        if not sampling.greedy:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        generation = GenerationConfig(
            do_sample=not sampling.greedy,
            max_new_tokens=1,
            eos_token_id=list(engine.eos_ids),
            pad_token_id=engine.eos_ids[0],
            **drawn,
        )
        config = _compat.continuous_batching_config(
            page_size=engine.page_size,
            allow_block_sharing=engine.share_prefixes,
            return_logprobs=True,
            seed=seed,  # of the first call: a run that is gone on with must not draw the same again
            drop_unsupported_processors=False,
            **engine._cache_options(),
        )
        self.undo.enter_context(native_attention(self.model))
        self.undo.enter_context(without_autocast(self.model))
        try:
            self.manager = self.model.init_continuous_batching(generation, config)
            _compat.watch_prefix_cache(self.manager, engine._cached)
            _compat.when_generation_ends(self.manager, self._ended)
            self.manager.start()
        except BaseException:
            self.undo.close()
            raise

    @property
    def ending(self) -> bool:
        """Whether it takes no further request: its loop has failed, or is about to end."""
        return self.manager.background_thread_status.can_accept_new_requests() is not None

    def _ended(self) -> None:
        """In the manager's thread, after its last delivery: nobody must wait for a result that cannot come."""
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self._fail_pending)

    def _fail_pending(self) -> None:
        reason = self.manager.background_thread_status.fatal_error or "it was stopped"
        for done in self.pending:
            if not done.done():
                done.set_exception(EngineError(f"continuous batching has ended: {reason}"))

    def stop(self) -> None:
        try:
            self.manager.stop(block=True)
            self.manager.destroy()
        finally:
            self.undo.close()
            self.model.train(self.was_training)


logging.getLogger("transformers.generation.continuous_batching").setLevel(logging.ERROR)
