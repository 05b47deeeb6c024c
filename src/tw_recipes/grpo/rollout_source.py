"""Where the rollouts of a P-GRPO batch come from: the engine, its seeds, and what happens when it fails.

    prompts ──ForkJoinDecoder──► rollouts; those that an engine error ended are decoded again, `rollout_retries` times

A rollout that still failed stays in the batch as what it is: status "error" and its reason, never another sample in its
place. Tests: tests/recipes/grpo/test_pgrpo_rollouts.py.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from tw_core import TagIds
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.decoding.engine import Engine, Sampling, stable_seed
from tw_recipes.decoding.rollout import Rollout
from tw_recipes.grpo.pgrpo_config import PGRPOConfig

logger = logging.getLogger(__name__)


class RolloutSource:
    """Decodes the prompts of a batch with the weights of the moment.

    Args:
        engine: Any `Engine`.
        args: Limits, sampling and retries.
        tag_ids: Tags and glue of the tokenizer.
        eos_ids: Ids that end a response.

    Attributes:
        retried: Rollouts that were decoded again so far.
    """

    def __init__(self, engine: Engine, args: PGRPOConfig, tag_ids: TagIds, eos_ids: Sequence[int]) -> None:
        self.engine, self.args, self.tag_ids, self.eos_ids = engine, args, tag_ids, tuple(eos_ids)
        self.retried = 0

    def decoder(self, step: Any) -> ForkJoinDecoder:
        """The decoder of one batch, with that batch's seeds."""
        args = self.args
        return ForkJoinDecoder(
            self.engine,
            self.tag_ids,
            args.limits,
            Sampling(args.temperature, args.top_p, args.top_k, stable_seed(args.seed, step)),
            eos_ids=self.eos_ids,
            max_calls=args.max_calls,
            warm_prefix=args.warm_prefix,
        )

    def rollouts(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], step: Any) -> list[Rollout]:
        """One rollout a prompt, in order.

        Args:
            prompts: Token ids.
            keys: A name for each, unique among all processes.
            step: What tells this batch from all others; with `args.seed` and the key it gives the seeds, so that a
                resumed run decodes the same batch again.
        """
        if hasattr(self.engine, "cache_salt"):
            self.engine.cache_salt = f"step-{step}"  # prefixes computed with older weights must not be read
        decoder = self.decoder(step)
        # Continuous batching seeds the global generator.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            found = decoder.decode_all(prompts, keys)
            for attempt in range(self.args.rollout_retries):
                lost = [place for place, rollout in enumerate(found) if rollout.status == "error"]
                if not lost:
                    break
                logger.warning(
                    "%d of %d rollouts failed (%s); decoding them again, attempt %d",
                    *(len(lost), len(found), found[lost[0]].reason, attempt + 1),
                )
                time.sleep(self.args.retry_wait_s * 2**attempt)
                again = decoder.decode_all(
                    [prompts[place] for place in lost], [f"{keys[place]}/retry-{attempt + 1}" for place in lost]
                )
                self.retried += len(lost)
                for place, rollout in zip(lost, again, strict=True):
                    found[place] = rollout
        return found


def make_engine(
    model: Any, tokenizer: Any, args: PGRPOConfig, eos_ids: Sequence[int], *, sharded: bool, vllm: Any = None
) -> Engine:
    """The engine that `args.rollout_engine` names.

    Args:
        model: The model that is trained.
        tokenizer: Its tokenizer.
        args: The configuration.
        eos_ids: Ids that end a response.
        sharded: Whether the weights are spread over processes (FSDP, ZeRO-3).
        vllm: TRL's `VLLMGeneration`, if `args.use_vllm`.

    Raises:
        ValueError: Sharded weights and an engine of this process.
        EngineError: A server that lacks something.
    """
    kind = args.rollout_engine
    if kind == "auto":
        in_process = "lockstep" if model.device.type == "cpu" else "transformers"
        kind = "vllm" if args.use_vllm else in_process
        logger.info("rollout_engine: %s", kind)
    if kind == "vllm" and args.vllm_mode == "colocate":
        from tw_recipes.grpo.colocated import ColocatedEngine

        return ColocatedEngine(vllm, eos_ids=eos_ids, vocab_size=len(tokenizer))
    if kind == "vllm":
        from tw_recipes.decoding.openai_engine import OpenAIEngine

        base = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        name = args.rollout_model_name or model.config._name_or_path
        return OpenAIEngine(f"{base.rstrip('/')}/v1", name, tokenizer, eos_ids=eos_ids)
    if sharded:
        raise ValueError(
            f"rollout_engine={kind!r} decodes with the model in this process, whose weights are sharded (FSDP or "
            'ZeRO-3); start `vllm serve` and set use_vllm=True, vllm_mode="server"'
        )
    if kind == "lockstep":
        from tw_recipes.decoding.lockstep_engine import LockstepEngine

        return LockstepEngine(model, eos_ids=list(eos_ids))
    from tw_recipes.decoding.transformers_engine import TransformersEngine

    return TransformersEngine(model, eos_ids=list(eos_ids), memory_share=None if model.device.type == "cpu" else 0.5)
