"""vLLM in this process's care, without HTTP: for a trainer that decodes on the GPU it trains on.

    generate ──► thread with vLLM's event loop ──► AsyncLLM (its engine core is a process) ──► Completion
    aclose   ──► asleep if `enable_sleep_mode=True`: its GPU memory is free for training; the next call wakes it

vLLM is imported when an engine is made and not before: it is an option, `pip install "threadweaver[serve]"`. Log-probs
are those of the model (vLLM's default, `logprobs_mode="raw_logprobs"`), prefixes are cached block by block.

Guarded by tests/recipes/decoding/test_vllm_engine.py (a stand-in for vLLM) and tests/engines/test_colocated.py (vLLM).
"""

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import numpy as np

from tw_recipes.decoding.engine import Completion, EngineError, Request

_T = TypeVar("_T")


class VLLMEngine:
    """Runs requests on a vLLM engine of its own.

    Args:
        model: Folder or Hub name.
        eos_ids: Ids that end a sequence. Defaults to the model's generation_config.json.
        options: Fields of vLLM's `AsyncEngineArgs`: dtype, gpu_memory_utilization, max_model_len,
            tensor_parallel_size, enable_sleep_mode, … Tokenisation and prefix caching are set here.
    Raises:
        ImportError: vLLM is not installed.
        ValueError: No end-of-sequence id is known.
    """

    def __init__(self, model: str, *, eos_ids: Sequence[int] | None = None, **options: Any) -> None:
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ImportError(
                f"VLLMEngine needs vLLM, which cannot be imported ({error}); pip install 'threadweaver[serve]', or use "
                "OpenAIEngine with a server, or TransformersEngine"
            ) from error
        self._names = itertools.count()
        self._asleep = False
        self._sleeps = bool(options.get("enable_sleep_mode"))
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._llm: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        args = AsyncEngineArgs(model=model, skip_tokenizer_init=True, enable_prefix_caching=True, **options)

        async def start() -> Any:
            return AsyncLLM.from_engine_args(args)

        try:
            self._llm = self._wait(start())
            config = self._llm.model_config
            named = (config.try_get_generation_config() or {}).get("eos_token_id") if eos_ids is None else eos_ids
            self.eos_ids = tuple([named] if isinstance(named, int) else named or ())
            if not self.eos_ids:
                raise ValueError("eos_ids must hold at least one id: the model names none; pass eos_ids=[...]")
        except BaseException:
            self.shutdown()
            raise
        self.max_context: int | None = config.max_model_len
        self.vocab_size: int = config.get_vocab_size()

    @property
    def cached_share(self) -> float:
        """Share of all context tokens so far that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    async def generate(self, request: Request) -> Completion:
        """Completes one context.

        Raises:
            EngineError: The context holds ids outside the vocabulary or is too long, or vLLM lost the call.
        """
        self._validate(request)
        loop, raised = asyncio.get_running_loop(), list[Exception]()

        def deliver(ids: list[int]) -> None:
            try:
                if request.on_tokens is not None and not raised:
                    request.on_tokens(ids)
            except Exception as problem:  # the caller's: it must end this call, not be lost in the event loop
                raised.append(problem)

        tell = None if request.on_tokens is None else lambda ids: loop.call_soon_threadsafe(deliver, ids)
        output, ids, logprobs = await self._there(self._run(request, tell))
        if raised:
            raise raised[0]
        if output.outputs[0].finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended the call with {output.outputs[0].finish_reason!r}")
        cached = output.num_cached_tokens or 0
        self.prompt_tokens += len(request.context)
        self.cached_tokens += cached
        return Completion(
            np.array(ids, dtype=np.int64),
            np.array(logprobs, dtype=np.float64),
            output.outputs[0].finish_reason,
            cached_tokens=cached,
        )

    async def update_weights(self, path: str) -> None:
        """Takes the weights of a checkpoint folder and forgets all cached prefixes; no call may be in flight."""
        await self._there(self._reload(path))

    async def aclose(self) -> None:
        """Sleeps if it may (memory of weights and cache is given back); the next call wakes it."""
        if self._sleeps and not self._asleep:
            await self._there(self._llm.sleep(level=1))
            self._asleep = True

    def shutdown(self) -> None:
        """Ends vLLM's processes and the thread; the engine is gone after that."""
        llm, self._llm = self._llm, None

        async def finish() -> None:
            if llm is not None:
                llm.shutdown()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        if self._thread.is_alive():
            self._wait(finish())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _run(self, request: Request, tell: Any) -> tuple[Any, list[int], list[float]]:
        """One call, in vLLM's loop; a cancelled one is aborted by vLLM when its generator closes."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        await self._wake()
        sampling = request.sampling
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=request.seed,
            logit_bias={int(token): float(bias) for token, bias in sampling.logit_bias.items()} or None,
            stop_token_ids=list(request.stop_ids),
            ignore_eos=True,  # the stop ids are the request's, whatever the model's configuration says
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": request.context.tolist()}
        ids, logprobs = list[int](), list[float]()
        output = None
        async for output in self._llm.generate(prompt, params, f"call-{next(self._names)}"):
            part = output.outputs[0]
            new = list(part.token_ids)
            logprobs += [at[token].logprob for token, at in zip(new, part.logprobs or (), strict=True)]
            ids += new
            if tell is not None and new:
                tell(new)
        return output, ids, logprobs

    async def _wake(self) -> None:
        if self._asleep:
            await self._llm.wake_up()
            self._asleep = False

    async def _reload(self, path: str) -> None:
        await self._wake()
        await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        await self._llm.reset_prefix_cache()

    def _validate(self, request: Request) -> None:
        if self._llm is None:
            raise EngineError("the engine was shut down; make another one")
        low, high = int(request.context.min()), int(request.context.max())
        if low < 0 or high >= self.vocab_size:
            raise EngineError(f"context ids must lie in 0..{self.vocab_size - 1}, got {low}..{high}")
        if self.max_context is not None and len(request.context) + request.max_tokens > self.max_context:
            raise EngineError(
                f"context and max_tokens must fit {self.max_context} tokens, got {len(request.context)} + "
                f"{request.max_tokens}"
            )

    async def _there(self, work: Awaitable[_T]) -> _T:
        """Runs a coroutine in vLLM's loop; a cancellation here cancels it there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_awaited(work), self._loop))

    def _wait(self, work: Awaitable[_T]) -> _T:
        return asyncio.run_coroutine_threadsafe(_awaited(work), self._loop).result()


async def _awaited(work: Awaitable[_T]) -> _T:
    return await work
