"""What a server can do, found out by asking it: four short calls, once, before anything is decoded.

A server that takes text only (transformers serve), ignores `stop_token_ids` or gives no ids back (llama.cpp) cannot
run fork/join decoding, and some of them answer 200 all the same. The probe says everything that is missing at once.
It also measures what log-probs mean there: vLLM gives those of the model, SGLang those of the distribution that was
sampled from (after temperature and logit bias).

Guarded by tests/recipes/decoding/test_recorded_exchanges.py.
"""

from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import openai

from tw_recipes.decoding.engine import EngineError, Request, Sampling
from tw_recipes.decoding.openai_wire import LostReply, completion_body, read_json
from tw_recipes.decoding.replicas import Replica

LogprobsOf = Literal["model", "sampled"]

_CERTAIN = -1e-3  # a log-prob above this is that of a certain token
# What a server keeps back of its max_model_len: SGLang 0.5.23 refuses prompts longer than it less 6.
_RESERVED = {"sglang": 6}


@dataclass(frozen=True, slots=True)
class Server:
    """What a probe found.

    Attributes:
        name: Host and port.
        kind: Who it says it is: "vllm", "sglang", …
        max_context: The most tokens of context and completion together, None if it does not say.
        logprobs_of: "model": log-probs of the model as it is. "sampled": of the distribution sampled from, after
            temperature and logit bias; equal to the model's at temperature 1 without bias.
    """

    name: str
    kind: str
    max_context: int | None
    logprobs_of: LogprobsOf


def reason(error: Exception) -> str:
    """One line about a failed call, from either form of error body; request headers (the API key) stay out."""
    if isinstance(error, openai.APIStatusError):
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        return f"HTTP {error.status_code}: {str(message or body or error.message)[:300]}"
    if isinstance(error, openai.APITimeoutError):
        return "no reply within the timeout"
    if isinstance(error, openai.APIConnectionError):
        return f"connection failed ({error.__cause__ or error})"
    return str(error) or type(error).__name__


def probe(client: openai.OpenAI, replica: Replica, model: str, prompt: list[int]) -> Server:
    """Asks one server what it can do.

    Args:
        client: Of this server.
        replica: Its name in messages.
        model: Name of the model there.
        prompt: Some ids of the vocabulary.
    Raises:
        EngineError: It does not answer, does not serve the model, or lacks something; the message lists it all.
    """
    try:
        listed = client.models.list().data
    except openai.APIError as error:
        raise EngineError(
            f"{replica.name} does not answer GET {urlsplit(replica.url).path}/models ({reason(error)}); start it, mend "
            "the path (vLLM and SGLang: /v1), set OPENAI_API_KEY if it wants a key, or drop it from base_urls"
        ) from error
    card = next((entry for entry in listed if entry.id == model), None)
    ask = _Asker(client, model, np.array(prompt, dtype=np.int64))
    try:
        missing, first = ask.what_is_missing()
    except openai.NotFoundError:
        card, missing, first = None, [], 0
    if card is None and not missing:
        raise EngineError(
            f"{replica.name} does not serve {model!r}; it serves {[entry.id for entry in listed]}: pass one of these "
            "names as model (--served-name)"
        )
    if missing:
        raise EngineError(
            f"{replica.name} cannot run fork/join decoding: {'; '.join(missing)}. vLLM and SGLang can; use one of "
            "them (docs/engines.md has the tested versions)"
        )
    kind, length = card.owned_by or "unknown", (card.model_extra or {}).get("max_model_len")
    if length is not None:
        length -= _RESERVED.get(kind, 0)
    return Server(replica.name, kind, length, ask.logprobs_of(first))


class _Asker:
    """The calls of a probe."""

    def __init__(self, client: openai.OpenAI, model: str, prompt: np.ndarray) -> None:
        self.client, self.model, self.prompt = client, model, prompt

    def what_is_missing(self) -> tuple[list[str], int]:
        """Everything that is missing, and the first greedy token (if nothing is)."""
        try:
            choice, count = self._post(self._body(1))
        except openai.NotFoundError:
            raise
        except openai.APIStatusError as error:
            return self._refused(error), 0
        missing = []
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or choice.get("prompt_token_ids") is None:
            missing.append("its replies have no token_ids and prompt_token_ids (it ignores return_token_ids)")
        if not logprobs:
            missing.append("its replies have no logprobs.token_logprobs")
        # Where the first greedy token is known it is the stop id; elsewhere a bias makes one certain.
        stop = ids[0] if ids else int(self.prompt[0])
        choice, count = self._post(self._body(4, stop, {} if ids else {stop: 100.0}))
        if count != 1:
            missing.append(f"it ignores stop_token_ids (it wrote {count} tokens where the first one was a stop id)")
        return missing, stop

    def logprobs_of(self, greedy: int) -> LogprobsOf:
        """Whether a bias that makes a token certain shows in the log-prob that is told for it."""
        token = next(int(token) for token in self.prompt if token != greedy)
        try:
            choice, _ = self._post(self._body(1, bias={token: 100.0}))
        except openai.APIStatusError as error:
            raise EngineError(f"{self.client.base_url.host} refuses logit_bias ({reason(error)})") from error
        if choice["token_ids"] != [token]:
            raise EngineError(f"{self.client.base_url.host} ignores logit_bias: {token} was certain, got {choice}")
        return "sampled" if choice["logprobs"]["token_logprobs"][0] > _CERTAIN else "model"

    def _refused(self, error: openai.APIStatusError) -> list[str]:
        """Which part of a refused call is at fault."""
        whole = self._body(1)
        least = {"model": self.model, "prompt": "1", "max_tokens": 1}
        parts = {
            "a prompt of token ids": {"prompt": whole["prompt"]},
            "return_token_ids": {"return_token_ids": True},
            "stop_token_ids": {"stop_token_ids": whole["prompt"][:1]},
            "logprobs": {"logprobs": 1},
        }
        missing = []
        for name, fields in parts.items():
            try:
                self._post(least | fields)
            except openai.APIStatusError as refusal:
                missing.append(f"it refuses {name} ({reason(refusal)})")
        return missing or [f"it refuses a call with all sampling fields ({reason(error)})"]

    def _body(self, max_tokens: int, stop: int | None = None, bias: dict[int, float] | None = None) -> dict[str, Any]:
        sampling = Sampling(0.0, logit_bias=bias or {})
        stops = () if stop is None else (stop,)
        return completion_body(Request(self.prompt, stops, max_tokens, sampling), self.model)

    def _post(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The choice of a reply, and how many tokens it says to have written."""
        try:
            answer = self.client.completions.with_raw_response.create(model=self.model, prompt="", extra_body=body)
            reply = read_json(answer.content)
        except (openai.APIConnectionError, LostReply) as error:
            raise EngineError(f"{self.client.base_url.host} stopped answering ({reason(error)}); try again") from error
        choices = reply.get("choices") or [{}]
        return choices[0], (reply.get("usage") or {}).get("completion_tokens", 0)
