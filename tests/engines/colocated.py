"""Runs in the engines' virtual environment, which has vLLM: decodes prompts on `VLLMEngine`, writes what came out.

    python -m tests.engines.colocated JOB.json OUT.json

The job holds the model's folder, another one whose weights are taken over in between, prompts and limits.
"""

import asyncio
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from tw_core import TagIds
from tw_recipes.decoding import GREEDY, ForkJoinDecoder, Limits, VLLMEngine


def main(job: dict) -> dict:
    """Decodes with the first weights, with the second ones, with the first ones again."""
    engine = VLLMEngine(job["folder"], dtype="float32", max_model_len=job["max_context"], max_num_seqs=64,
                        block_size=32, enforce_eager=True)  # fmt: skip
    tags = TagIds.from_tokenizer(AutoTokenizer.from_pretrained(job["folder"]))
    decoder = ForkJoinDecoder(engine, tags, Limits(max_total_tokens=job["max_total_tokens"]), GREEDY)
    runs, parts = [], []
    for folder in (None, job["other"], job["folder"]):
        if folder is not None:
            asyncio.run(engine.update_weights(folder))
        rollouts = decoder.decode_all(job["prompts"])
        runs.append(
            {
                "ids": [one.ids.tolist() for one in rollouts],
                "logprobs": [[values.tolist() for values in one.logprobs or ()] for one in rollouts],
                "cached_share": [one.cached_share for one in rollouts],
            }
        )

    async def streamed() -> list[int]:
        one = await decoder.decode(job["prompts"][0], "streamed", on_event=lambda e: parts.append((e.kind, e.ids)))
        return one.ids.tolist()

    ids = asyncio.run(streamed())
    asyncio.run(cancelled(decoder, job["prompts"][1]))
    after = decoder.decode_all(job["prompts"][:1])[0].ids.tolist()
    engine.shutdown()
    told = sum(len(ids) for kind, ids in parts if kind == "tokens")
    return {
        "runs": runs,
        "streamed": ids,
        "told": told,
        "called": sum(len(ids) for kind, ids in parts if kind == "call"),
        "after_cancel": after,
        "eos_ids": engine.eos_ids,
        "max_context": engine.max_context,
    }


async def cancelled(decoder: ForkJoinDecoder, prompt: list[int]) -> None:
    """Stops a trajectory in the middle."""
    rollout = await decoder.decode(prompt, "cancelled", on_event=lambda event: decoder.cancel("cancelled"))
    assert rollout.status == "cancelled"


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
