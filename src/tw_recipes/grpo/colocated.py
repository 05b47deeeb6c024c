"""TRL's colocated vLLM as an engine: the `LLM` that `use_vllm=True, vllm_mode="colocate"` keeps beside the trainer.

    wave of calls ──► llm.generate(token ids, one SamplingParams each) ──► completions with log-probs
    before        wake up; weights that sleep has dropped are pushed again     aclose: asleep, memory free to train

TRL pushes new weights before each batch (`sync_weights`), which also empties the prefix cache. (`VLLMEngine` is for
programs that own their vLLM; this one must share TRL's.)

Tests: tests/recipes/grpo/test_pgrpo_vllm.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tw_recipes.decoding.engine import Completion, Request
from tw_recipes.decoding.waves import WaveEngine


class ColocatedEngine(WaveEngine):
    """Runs requests on TRL's in-process vLLM.

    Args:
        generation: The trainer's `vllm_generation`, in colocate mode.
        eos_ids: Ids that end a sequence.
        vocab_size: Size of the vocabulary.
        max_context: Tokens of context and completion; vLLM's own limit if None.
        max_batch: The most calls handed over at once; vLLM schedules them.
    """

    def __init__(
        self,
        generation: Any,
        *,
        eos_ids: Sequence[int],
        vocab_size: int,
        max_context: int | None = None,
        max_batch: int = 4096,
    ) -> None:
        if max_context is None:
            max_context = int(generation.llm.llm_engine.model_config.max_model_len)
        super().__init__(list(eos_ids), vocab_size, max_context, max_batch)
        self.generation = generation
        self._awake = not generation.enable_sleep_mode

    async def _complete(self, requests: list[Request]) -> list[Completion]:
        from vllm import SamplingParams

        if not self._awake:
            if self.generation._llm_weights_sleeping:
                self.generation.sync_weights()
            self.generation.llm.wake_up(tags=["kv_cache"])
            self._awake = True
        params = [
            SamplingParams(
                n=1,
                temperature=request.sampling.temperature,
                top_p=request.sampling.top_p,
                top_k=request.sampling.top_k,
                seed=request.seed,
                max_tokens=request.max_tokens,
                stop_token_ids=list(request.stop_ids),
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.context.tolist()} for request in requests]
        outputs = self.generation.llm.generate(prompts, sampling_params=params, use_tqdm=False)
        return [_completion(output.outputs[0], request) for output, request in zip(outputs, requests, strict=True)]

    async def aclose(self) -> None:
        """Lets vLLM sleep if TRL configured that."""
        if self.generation.enable_sleep_mode and self._awake:
            self.generation.llm.sleep(level=2)
            self.generation._llm_weights_sleeping = True
            self._awake = False


def _completion(output: Any, request: Request) -> Completion:
    ids = np.array(output.token_ids, dtype=np.int64)
    logprobs = np.array(
        [own[token].logprob for token, own in zip(output.token_ids, output.logprobs, strict=True)], dtype=np.float64
    )
    stopped = bool(len(ids)) and int(ids[-1]) in request.stop_ids
    return Completion(ids, logprobs, "stop" if stopped else "length")
