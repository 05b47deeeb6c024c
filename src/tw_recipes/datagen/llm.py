"""What the generator asks of a language model: one question in, one reply out, errors by what to do about them.

    TransientError   try again later (connection, 429, 5xx)
    EndpointError    this question will not be answered: the record fails
    AccessError      no question will be answered (key, model name): the run stops

`tw_recipes.datagen.openai_llm.OpenAILLM` talks to servers; anything with `complete` will do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tw_recipes.datagen.reasons import DatagenError

Finish = Literal["stop", "length", "refusal"]


@dataclass(frozen=True, slots=True)
class LLMRequest:
    """One question.

    Attributes:
        question: Its kind, one of `prompts.QUESTIONS`.
        model: Name of the model on the server.
        messages: {"role", "content"} each.
        schema: JSON schema of the reply.
        max_tokens: The most tokens of a reply.
        key: Names the record; all its questions carry the same, so that a router can keep them together.
    """

    question: str
    model: str
    messages: Sequence[Mapping[str, str]]
    schema: Mapping[str, Any]
    max_tokens: int
    key: str


@dataclass(frozen=True, slots=True)
class LLMReply:
    """One reply.

    Attributes:
        text: What was said, "" if nothing.
        finish: "stop", "length" (out of tokens) or "refusal" (the server says so).
        prompt_tokens: As the server counts them.
        completion_tokens: Likewise.
    """

    text: str
    finish: Finish = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class LLM(Protocol):
    """A model behind an endpoint, or one in this process."""

    async def complete(self, request: LLMRequest) -> LLMReply:
        """Answer one question.

        Raises:
            TransientError: See the module docstring, like the other two.
            EndpointError: See there.
            AccessError: See there.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class TransientError(DatagenError):
    """The endpoint may answer later.

    Attributes:
        retry_after: Seconds that the server asks for, None if it does not say.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class EndpointError(DatagenError):
    """The endpoint does not answer this question."""


class AccessError(DatagenError):
    """The endpoint answers nobody: a wrong key, model or address."""


@dataclass(frozen=True)
class Price:
    """Money for a million tokens.

    Attributes:
        prompt: Of the prompt.
        completion: Of the reply.
    """

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Cost of a call."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Models:
    """Which model answers which kind of question, and what it costs.

    Attributes:
        default: Name of the model.
        by_question: Other models for single kinds of questions.
        prices: Money for a million tokens, by model.
    """

    default: str
    by_question: Mapping[str, str] = field(default_factory=dict)
    prices: Mapping[str, Price] = field(default_factory=dict)

    def of(self, question: str) -> str:
        """The model of a question."""
        return self.by_question.get(question, self.default)

    def cost(self, model: str, prompt_tokens: int, completion_tokens: int) -> float:
        """Cost of a call."""
        price = self.prices.get(model)
        return price.of(prompt_tokens, completion_tokens) if price else 0.0
