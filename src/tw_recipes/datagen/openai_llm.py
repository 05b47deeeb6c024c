"""An annotator behind any OpenAI-compatible endpoint: hosted services, vLLM, SGLang, llama.cpp.

Retries are the annotator's business, so the client's own are off. Where the server takes a JSON schema it is given
one; a server that refuses it gets plain JSON mode, then nothing but the prompt ("auto"), which is logged once.
Guarded by tests/recipes/datagen/test_openai_llm.py, on a real local server.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import openai

from tw_recipes.datagen.llm import AccessError, EndpointError, LLMReply, LLMRequest, TransientError

logger = logging.getLogger(__name__)

Structured = Literal["auto", "json_schema", "json_object", "none"]
_DOWN: dict[str, Structured] = {"json_schema": "json_object", "json_object": "none"}


class OpenAILLM:
    """Chat completions of one endpoint.

    Args:
        base_url: For example http://localhost:8000/v1; None is the client's default (OPENAI_BASE_URL or OpenAI).
        api_key: The key; servers of one's own often need none.
        structured: How replies are held to their shape: by "json_schema", by "json_object", by the prompt alone
            ("none"), or the first of these that the server takes ("auto").
        temperature: None leaves it to the server.
        timeout_s: Seconds for one call.
        extra: Further fields of the request body, e.g. {"reasoning_effort": "low"}.
    Raises:
        ValueError: `base_url` holds a user name or password, or `structured` is none of the above.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        structured: Structured = "auto",
        temperature: float | None = None,
        timeout_s: float = 600.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if base_url is not None and urlsplit(base_url).username is not None:
            raise ValueError("base_url must not hold a user name or password; put the key into the environment")
        if structured not in get_args(Structured):
            raise ValueError(f"structured must be one of {', '.join(get_args(Structured))}, got {structured!r}")
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=timeout_s
        )
        self._mode: Structured = "json_schema" if structured == "auto" else structured
        self._steps_down = structured == "auto"
        self._temperature, self._extra = temperature, dict(extra or {})

    async def complete(self, request: LLMRequest) -> LLMReply:
        """Answer one question; see `tw_recipes.datagen.llm.LLM`."""
        while True:
            mode = self._mode
            try:
                return _reply(await self._client.chat.completions.create(**self._body(request, mode)))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._steps_down or mode not in _DOWN or "response_format" not in str(error):
                    raise EndpointError(_said(error)) from error
                if self._mode == mode:
                    self._mode = _DOWN[mode]
                    logger.warning("the server refuses response_format %r; going on with %r", mode, self._mode)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise AccessError(
                    f"{self._client.base_url} refuses every call ({_said(error)}); check the key's variable, the "
                    "model's name and the address"
                ) from error
            except (openai.APIConnectionError, openai.APITimeoutError) as error:
                raise TransientError(f"{type(error).__name__}: {error}") from error
            except openai.APIStatusError as error:
                if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
                    raise TransientError(_said(error), _retry_after(error)) from error
                raise EndpointError(_said(error)) from error
            except openai.APIError as error:
                raise TransientError(f"{type(error).__name__}: {error}") from error

    def _body(self, request: LLMRequest, mode: Structured) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": list(request.messages),
            "max_completion_tokens": request.max_tokens,
            "user": request.key,
            "extra_body": self._extra,
        }
        if self._temperature is not None:
            body["temperature"] = self._temperature
        if mode == "json_schema":
            shape = {"name": request.question, "schema": dict(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": shape}
        elif mode == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()


def _reply(answer: Any) -> LLMReply:
    if not getattr(answer, "choices", None):
        raise EndpointError(f"expected a chat completion with a choice, got {str(answer)[:100]!r}; check base_url")
    choice, usage = answer.choices[0], answer.usage
    refused = bool(getattr(choice.message, "refusal", None)) or choice.finish_reason == "content_filter"
    return LLMReply(
        text=choice.message.content or getattr(choice.message, "refusal", None) or "",
        finish="refusal" if refused else "length" if choice.finish_reason == "length" else "stop",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )


def _said(error: openai.APIStatusError) -> str:
    return f"HTTP {error.status_code}: {error.message}"[:500]


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        return float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
