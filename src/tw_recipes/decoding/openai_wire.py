"""The wire format of a token-id call of `/v1/completions`, as vLLM and SGLang speak it: body out, reply in.

A reply is believed only as far as it adds up: the context comes back as it was sent, ids, log-probs and usage have
one length, and the end is read from the last id, never from the server's word for it. (vLLM says `stop_reason: null`
at an end of sequence, SGLang says `matched_stop`; both keep the stop id in `token_ids` and drop it from `text`, which
is not read at all.)

Guarded by tests/recipes/decoding/test_recorded_exchanges.py (replies of real servers) and test_faults.py.
"""

import json
from typing import Any

import numpy as np

from tw_recipes.decoding.engine import Completion, EngineError, Request, check_completion


class LostReply(Exception):
    """A reply that never came whole, or that the server took back: the same call may be sent again."""


def completion_body(request: Request, model: str, *, cache_salt: str | None = None) -> dict[str, Any]:
    """The JSON body of one call.

    Every sampling field is sent, because servers take missing ones from the model's generation_config.json.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.context.tolist(),
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # SGLang refuses 0, both take -1 for "every token"
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(request.stop_ids),
        "return_token_ids": True,
        "logprobs": 1,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): float(bias) for token, bias in sampling.logit_bias.items()}
    if cache_salt is not None:
        body["cache_salt"] = cache_salt
    return body


def read_json(content: bytes) -> dict[str, Any]:
    """The object in the body of a reply.

    Raises:
        LostReply: The body is cut off, or no JSON object.
    """
    try:
        reply = json.loads(content)
    except ValueError as error:
        raise LostReply(f"its reply is cut off or no JSON, it ends in {content[-40:]!r}") from error
    if not isinstance(reply, dict):
        raise LostReply(f"its reply is no JSON object: {content[:40]!r}")
    return reply


def read_completion(reply: dict[str, Any], request: Request) -> Completion:
    """The completion in a reply.

    Raises:
        LostReply: The server aborted the call.
        EngineError: Something is missing, or counts differ.
    """
    choices = reply.get("choices") or [{}]
    if len(choices) != 1:
        raise EngineError(f"it gave {len(choices)} choices for one prompt")
    choice = choices[0]
    finish = choice.get("finish_reason")
    if finish == "abort":
        raise LostReply("it aborted the call")
    if choice.get("token_ids") is None or choice.get("prompt_token_ids") is None:
        raise EngineError("its reply has no token_ids and prompt_token_ids, though return_token_ids was asked for")
    ids = np.array(choice["token_ids"], dtype=np.int64)
    if choice["prompt_token_ids"] != request.context.tolist():
        raise EngineError("it read another context than it was sent: prompt_token_ids differ from the prompt")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if logprobs is None or any(value is None for value in logprobs):
        raise EngineError("its reply lacks logprobs.token_logprobs, though logprobs were asked for")
    usage = reply.get("usage") or {}
    counts = {
        "logprobs": len(logprobs),
        "usage.completion_tokens": usage.get("completion_tokens"),
        "usage.prompt_tokens": usage.get("prompt_tokens"),
    }
    expected = dict(zip(counts, (len(ids), len(ids), len(request.context)), strict=True))
    if counts != expected:
        raise EngineError(f"its counts do not add up: expected {expected} by the ids of the reply, got {counts}")
    if finish not in ("stop", "length"):
        raise EngineError(f"finish_reason must be stop or length, got {finish!r}")
    if finish == "stop" and not (len(ids) and ids[-1] in request.stop_ids):
        matched = [choice[name] for name in ("stop_reason", "matched_stop") if choice.get(name) is not None]
        if matched and matched[0] in request.stop_ids and matched[0] not in ids:
            raise EngineError(f"it stopped at id {matched[0]} and left this id out of token_ids")
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    completion = Completion(ids, np.array(logprobs, dtype=np.float64), finish, cached_tokens=cached)
    check_completion(request, completion)
    if finish == "length" and len(ids) < request.max_tokens:
        raise EngineError(
            f"it wrote {len(ids)} of {request.max_tokens} tokens and calls that the length: it has less room than "
            "max_context says; pass max_context=..."
        )
    return completion


class StreamedReply:
    """A streamed reply put together again: each chunk holds one or more tokens, the last one no choice but usage."""

    def __init__(self) -> None:
        self.choice: dict[str, Any] = {"token_ids": [], "logprobs": {"token_logprobs": []}}
        self.usage: dict[str, Any] = {}

    def add(self, chunk: dict[str, Any]) -> list[int]:
        """Takes one chunk; returns its new ids.

        Raises:
            EngineError: A chunk without ids or log-probs.
        """
        self.usage = chunk.get("usage") or self.usage
        if not (choices := chunk.get("choices")):
            return []
        choice = choices[0]
        ids = choice.get("token_ids")
        if ids is None and choice.get("text"):
            raise EngineError("a chunk of its stream has text and no token_ids")
        ids = ids or []
        self.choice["token_ids"] += ids
        self.choice["logprobs"]["token_logprobs"] += (choice.get("logprobs") or {}).get("token_logprobs") or []
        for name in ("prompt_token_ids", "finish_reason", "stop_reason", "matched_stop"):
            if choice.get(name) is not None:
                self.choice[name] = choice[name]
        return ids

    def reply(self) -> dict[str, Any]:
        """The whole, in the form of a reply that was not streamed.

        Raises:
            LostReply: The stream ended before its end was told.
        """
        if "finish_reason" not in self.choice:
            raise LostReply("its stream broke off")
        return {"choices": [self.choice], "usage": self.usage}
