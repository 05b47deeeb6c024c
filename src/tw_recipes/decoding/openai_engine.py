"""A client for servers that complete token ids over HTTP: vLLM and SGLang behind `/v1/completions`.

    Request ─ checked ─► home replica of its key ─► reply ─ checked ─► Completion
                 │             ▲         │ 429, 5xx, cut off, aborted: wait, same replica again
                 ▼             └─────────┤
            EngineError                  └ dead (answers nothing): wait, next replica of the key

Ids and lengths are checked before they are sent, because servers differ in what a bad one does (an error, a silent
cut, in one case the end of the server). Log-probs are the server's: `OpenAIEngine.logprobs_of` says of what.

Guarded by tests/recipes/decoding/test_openai_engine.py, test_faults.py, and on a real server tests/engines.
"""

import asyncio
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential
from tenacity.wait import wait_random_exponential

from tw_recipes.decoding.engine import Completion, EngineError, Request
from tw_recipes.decoding.openai_probe import LogprobsOf, Server, probe, reason
from tw_recipes.decoding.openai_wire import LostReply, StreamedReply, completion_body, read_completion, read_json
from tw_recipes.decoding.replicas import Replica, Replicas

KEY_VARIABLE = "OPENAI_API_KEY"
_PROBE_TIMEOUT_S = 120.0
_ALIVE_TIMEOUT_S = 5.0
# What may be gone at the next try. Other refusals (400, 401, 404, …) stay what they are.
_PASSING = (LostReply, openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)


class OpenAIEngine:
    """Completes token ids on one or more OpenAI-compatible servers (vLLM, SGLang).

    The servers are probed when the engine is made: they must be up, serve `model` and have all that fork/join
    decoding needs. An API key is read from the environment variable OPENAI_API_KEY and is never logged.

    Args:
        base_urls: One base URL or several, e.g. "http://localhost:8000/v1". Several are replicas of one model: all
            calls of one trajectory (`Request.key`) go to the same one, and move only when it is dead.
        model: Name of the model on the servers.
        tokenizer: Its tokenizer: vocabulary, end of sequence.
        eos_ids: Ids that end a sequence. Defaults to the tokenizer's and those of its generation_config.json.
        max_context: The most tokens of context and completion together. Defaults to what the servers say.
        timeout_s: Seconds without an answer (streaming: without a token) after which a call counts as hung. A call
            is answered when its last token is written, so it bounds the time of one call.
        attempts: The most tries of one call.
        backoff_s: About the first wait between two tries; it doubles, up to `max_backoff_s`, with jitter.
        max_backoff_s: The longest wait.
        cache_salt: Keeps cached prefixes of other salts apart; change it (`engine.cache_salt = …`) with the weights.
    Raises:
        EngineError: A server does not answer, does not serve the model, or lacks something.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        model: str,
        tokenizer: Any,
        *,
        eos_ids: Sequence[int] | None = None,
        max_context: int | None = None,
        timeout_s: float = 1800.0,
        attempts: int = 8,
        backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        cache_salt: str | None = None,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be >= 1, got {attempts}")
        if not (timeout_s > 0 and backoff_s > 0 and max_backoff_s >= backoff_s):
            raise ValueError(
                "timeout_s and backoff_s must be > 0 and max_backoff_s >= backoff_s, got "
                f"{timeout_s}, {backoff_s} and {max_backoff_s}"
            )
        self.replicas = Replicas([base_urls] if isinstance(base_urls, str) else base_urls)
        self.model = model
        self.eos_ids = tuple(int(token) for token in (_eos_ids(tokenizer) if eos_ids is None else eos_ids))
        if not self.eos_ids:
            raise ValueError("eos_ids must hold at least one id: the tokenizer names none; pass eos_ids=[...]")
        self.vocab_size = len(tokenizer)
        self.timeout_s, self.attempts = timeout_s, attempts
        self.cache_salt = cache_salt
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._backoff = wait_exponential(backoff_s / 2, max_backoff_s / 2) + wait_random_exponential(
            backoff_s / 2, max_backoff_s / 2
        )
        self._nameless = itertools.count()
        self._clients: tuple[asyncio.AbstractEventLoop, dict[str, openai.AsyncOpenAI]] | None = None
        self.servers = self._probe()
        said = [server.max_context for server in self.servers if server.max_context is not None]
        self.max_context = max_context or (min(said) if len(said) == len(self.servers) else None)
        if self.max_context is None:
            raise ValueError("max_context must be given: a server does not say max_model_len in GET /v1/models")

    @property
    def logprobs_of(self) -> LogprobsOf:
        """What log-probs are of: the "model" (vLLM), or the distribution "sampled" from (SGLang)."""
        return self.servers[0].logprobs_of

    @property
    def cached_share(self) -> float:
        """Share of all context tokens so far that came from the servers' prefix caches (0 if they do not say)."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    async def generate(self, request: Request) -> Completion:
        """Completes one context.

        Raises:
            EngineError: The request cannot be sent (ids, length), every try failed, or the reply does not add up.
        """
        self._validate(request)
        key = request.key or f"call-{next(self._nameless)}"
        attempt, replica = 0, self.replicas.pick(key)
        try:
            async for tried in self._retrying():
                with tried:
                    attempt, replica = tried.retry_state.attempt_number, self.replicas.pick(key)
                    completion = await self._send(request, replica, attempt)
        except EngineError as error:
            raise EngineError(f"{replica.name}: {error}") from error
        except openai.APIStatusError as error:
            raise EngineError(f"{replica.name} refused the call: {reason(error)}") from error
        except (LostReply, openai.APIError) as error:
            raise EngineError(f"{replica.name}: {reason(error)}, after {attempt} tries") from error
        self.prompt_tokens += len(request.context)
        self.cached_tokens += completion.cached_tokens or 0
        # The server may write ids that the tokenizer has no token for (padded matrices); they are contexts later.
        self.vocab_size = max(self.vocab_size, int(completion.ids.max(initial=0)) + 1)
        return Completion(
            *(completion.ids, completion.logprobs, completion.finish, completion.cached_tokens),
            *(replica.name, attempt),
        )

    async def aclose(self) -> None:
        """Closes the connections; the next call opens them again."""
        held, self._clients = self._clients, None
        if held is not None and held[0] is asyncio.get_running_loop():
            await asyncio.gather(*(client.close() for client in held[1].values()))

    async def _send(self, request: Request, replica: Replica, attempt: int) -> Completion:
        """One try; a replica that is found dead is buried on the way out."""
        body = completion_body(request, self.model, cache_salt=self.cache_salt)
        call = self._client(replica).completions
        # The body overrides the prompt: as a typed argument the client walks it id by id (13 ms per 1,000 ids).
        fields: dict[str, Any] = {"model": self.model, "prompt": "", "extra_body": body}
        try:
            if request.on_tokens is None:
                answer = await call.with_raw_response.create(**fields)
                reply = read_json(answer.content)
            else:
                reply = await self._streamed(call, fields, request, tell=attempt == 1)
        except openai.APIConnectionError:
            if len(self.replicas.all) > 1 and not replica.dead and not await self._alive(replica):
                replica.bury()
            raise
        return read_completion(reply, request)

    async def _streamed(self, call: Any, fields: dict[str, Any], request: Request, tell: bool) -> dict[str, Any]:
        """A call whose ids are told as they come; a second try is silent, its ids might be others."""
        whole = StreamedReply()
        more = {"stream": True, "stream_options": {"include_usage": True}}
        async with await call.create(**fields, **more) as stream:
            async for chunk in stream:
                ids = whole.add(chunk.model_dump(warnings=False))
                if ids and tell and request.on_tokens is not None:
                    request.on_tokens(ids)
        return whole.reply()

    async def _alive(self, replica: Replica) -> bool:
        """Whether a server answers anything at all."""
        try:
            await self._client(replica).models.list(timeout=_ALIVE_TIMEOUT_S)
        except openai.APIConnectionError:
            return False
        except openai.APIError:
            pass
        return True

    def _validate(self, request: Request) -> None:
        sampling, known = request.sampling, self.vocab_size
        named = {
            "context": request.context,
            "stop_ids": np.array(request.stop_ids, dtype=np.int64),
            "logit_bias": np.array(list(sampling.logit_bias), dtype=np.int64),
        }
        for name, ids in named.items():
            if len(ids) and not (ids.min() >= 0 and ids.max() < known):
                raise EngineError(f"{name} must hold ids in 0..{known - 1}, got {ids.min()}..{ids.max()}")
        if not len(request.context) or request.max_tokens < 1:
            raise EngineError(
                "a call needs a context and max_tokens >= 1, got "
                f"{len(request.context)} context tokens and max_tokens={request.max_tokens}"
            )
        if len(request.context) + request.max_tokens > self.max_context:
            raise EngineError(
                f"context and max_tokens must fit {self.max_context} tokens, got {len(request.context)} + "
                f"{request.max_tokens}"
            )

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type(_PASSING),
            stop=stop_after_attempt(self.attempts),
            wait=self._wait,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        """Exponential back-off with jitter, and at least what the server asked for."""
        error = state.outcome.exception() if state.outcome is not None else None
        asked = 0.0
        if isinstance(error, openai.APIStatusError):
            text = error.response.headers.get("retry-after", "")
            asked = float(text) if text.isdigit() else 0.0
        return max(self._backoff(state), asked)

    def _client(self, replica: Replica) -> openai.AsyncOpenAI:
        loop = asyncio.get_running_loop()
        if self._clients is None or self._clients[0] is not loop:
            timeout = openai.Timeout(self.timeout_s, connect=30.0, pool=None)
            options = {"api_key": _api_key(), "timeout": timeout, "max_retries": 0}
            self._clients = (loop, {r.url: openai.AsyncOpenAI(base_url=r.url, **options) for r in self.replicas.all})
        return self._clients[1][replica.url]

    def _probe(self) -> list[Server]:
        ids = np.linspace(0, self.vocab_size - 1, 10, dtype=np.int64)[1:-1]
        prompt = [int(token) for token in ids if token not in self.eos_ids] or [0]
        timeout = min(self.timeout_s, _PROBE_TIMEOUT_S)
        found = []
        for replica in self.replicas.all:
            with openai.OpenAI(base_url=replica.url, api_key=_api_key(), timeout=timeout, max_retries=1) as client:
                found.append(probe(client, replica, self.model, prompt))
        if len({server.logprobs_of for server in found}) > 1:
            said = ", ".join(f"{server.name}: {server.logprobs_of}" for server in found)
            raise EngineError(f"base_urls must be replicas of one server, but their log-probs differ in kind ({said})")
        return found


def _api_key() -> str:
    """The key of the environment; a local server wants none, but the client sends one."""
    return os.environ.get(KEY_VARIABLE) or "none"


def _eos_ids(tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-sequence id, and those that its model's generation_config.json names (chat models)."""
    from transformers import GenerationConfig

    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        named = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
    except OSError:  # no such file: the tokenizer's id is all there is
        named = None
    return list(dict.fromkeys([*found, *([named] if isinstance(named, int) else named or [])]))
