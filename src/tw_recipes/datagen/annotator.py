"""Asks the annotator: renders a question, waits for its turn, retries, books, validates, and asks again if need be.

    ask ──render──► reserve budget ──► rate limit ──► LLM.complete ──► book, trace ──► validate ──► reply
                          ▲               └─ TransientError: back off with jitter, again          │
                          └──────────── reply unusable: the reason is told, one more try ◄────────┘

A reply counts only if it is JSON of the question's model and passes the stage's own check.
Guarded by tests/recipes/datagen/test_annotator.py.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from tw_recipes.datagen import models as shapes
from tw_recipes.datagen.accounting import Accounts
from tw_recipes.datagen.limits import Budget, RateLimiter
from tw_recipes.datagen.llm import LLM, AccessError, EndpointError, LLMReply, LLMRequest, Models, TransientError
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.prompts import Prompts
from tw_recipes.datagen.reasons import Reason, Rejected

_Reply = TypeVar("_Reply", bound=BaseModel)

REPLIES: dict[str, type[BaseModel]] = {
    "steps": shapes.StepsReply,
    "blocks": shapes.BlocksReply,
    "check": shapes.CheckReply,
    "rewrite": shapes.RewriteReply,
    "outlines": shapes.OutlinesReply,
}

_REFUSALS = ("i'm sorry", "i am sorry", "i can't", "i cannot", "i won't", "i'm unable", "sorry,", "as an ai")
_MESSAGE_TOKENS = 64  # what a chat template adds at most


@dataclass(frozen=True)
class RetryPolicy:
    """Retries of calls that brought no reply.

    Attributes:
        attempts: Calls in all.
        first_wait_s: Upper end of the first random wait; it doubles each time.
        max_wait_s: The longest wait, unless the server asks for more.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 60.0


class Annotator:
    """A language model with its limits and accounts; one for all stages of a run.

    Args:
        llm: Who answers.
        models: Which model answers which question.
        prompts: The questions.
        options: `tries` and `max_reply_tokens`.
        accounts: Where calls are booked.
        limiter: Rate limits.
        budget: Limit on tokens and money.
        max_calls: Calls in flight.
        retry: Retries of failed calls.
        secrets: Texts that must not be written anywhere; they are cut out of error messages.
    """

    def __init__(
        self,
        llm: LLM,
        models: Models,
        prompts: Prompts | None = None,
        options: StageOptions | None = None,
        *,
        accounts: Accounts | None = None,
        limiter: RateLimiter | None = None,
        budget: Budget | None = None,
        max_calls: int = 64,
        retry: RetryPolicy | None = None,
        secrets: tuple[str, ...] = (),
    ) -> None:
        if max_calls < 1:
            raise ValueError(f"max_calls must be at least 1, got {max_calls}")
        self.llm, self.models = llm, models
        self.prompts, self.options = prompts or Prompts(), options or StageOptions()
        self.accounts = accounts or Accounts(None, models)
        self.limiter, self.budget = limiter or RateLimiter(), budget or Budget()
        self.retry = retry or RetryPolicy()
        self._gate = asyncio.Semaphore(max_calls)
        self._secrets = tuple(secret for secret in secrets if secret)

    async def ask(
        self,
        question: str,
        reply_model: type[_Reply],
        check: Callable[[_Reply], Rejected | None],
        /,
        *,
        key: str,
        **values: Any,
    ) -> tuple[_Reply, Rejected | None]:
        """Ask until a reply passes its check, at most `options.tries` times.

        Args:
            question: One of `prompts.QUESTIONS`.
            reply_model: Shape of the reply.
            check: What else must hold; the reason if it does not.
            key: Names the record.
            values: For the template.

        Returns:
            (the last reply of the right shape, what its check found).

        Raises:
            Rejected: No reply had the right shape; the reason of the last one.
            EndpointError: No reply came.
            AccessError: No reply will ever come.
            BudgetExhaustedError: There is no budget for one more call.
        """
        messages = [
            {"role": "system", "content": self.prompts.system},
            {"role": "user", "content": self.prompts.render(question, **values)},
        ]
        last: tuple[_Reply, Rejected | None] | None = None
        for attempt in range(self.options.tries):
            reply = await self._complete(question, reply_model, messages, key)
            try:
                parsed = _parsed(reply, reply_model)
                problem = check(parsed)
                last = parsed, problem
            except Rejected as unusable:
                problem = unusable
                if attempt + 1 == self.options.tries and last is None:
                    raise
            if problem is None:
                break
            messages = [
                *messages,
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": f"This cannot be used ({problem.detail}). Answer again, as asked for."},
            ]
        assert last is not None
        return last

    async def _complete(
        self, question: str, reply_model: type[BaseModel], messages: list[dict[str, str]], key: str
    ) -> LLMReply:
        model, most = self.models.of(question), self.options.max_reply_tokens
        request = LLMRequest(question, model, messages, _schema(reply_model), most, key)
        size = sum(len(message["content"]) for message in messages)
        # No tokenizer makes more tokens than there are bytes; a typical one makes a quarter.
        ceiling = sum(len(m["content"].encode()) + _MESSAGE_TOKENS for m in messages)
        reserved = ceiling + most, self.models.cost(model, ceiling, most)
        expected = size // 4 + most // 4
        async with self._gate:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(TransientError),
                stop=stop_after_attempt(self.retry.attempts),
                wait=self._wait,
                retry_error_callback=_out_of_attempts,
                sleep=asyncio.sleep,
            ):
                with attempt:
                    return await self._once(request, reserved, expected)
        raise EndpointError("no attempt was made; attempts must be at least 1")

    async def _once(self, request: LLMRequest, reserved: tuple[int, float], expected: int) -> LLMReply:
        await self.budget.reserve(*reserved)
        used = (0, 0.0)
        try:
            await self.limiter.acquire(expected)
            began = time.perf_counter()
            try:
                reply = await self.llm.complete(request)
            except (TransientError, EndpointError) as error:
                self.limiter.settle(expected, 0)
                self.accounts.failed(request, self.redacted(str(error)), time.perf_counter() - began)
                raise
            except AccessError as error:
                raise AccessError(self.redacted(str(error))) from None
            usage = self.accounts.replied(request, reply, time.perf_counter() - began)
            used = usage.tokens, usage.cost
            self.limiter.settle(expected, usage.tokens)
            return reply
        finally:
            await self.budget.settle(reserved, used)

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        jitter = wait_random_exponential(multiplier=self.retry.first_wait_s, max=self.retry.max_wait_s)(state)
        return max(jitter, getattr(error, "retry_after", None) or 0.0)

    def redacted(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        return text

    async def aclose(self) -> None:
        """Close the model's connections and the accounts."""
        await self.llm.aclose()
        self.accounts.close()


def _out_of_attempts(state: RetryCallState) -> Any:
    error = state.outcome.exception() if state.outcome else None
    raise EndpointError(f"no reply after {state.attempt_number} attempts: {error}") from error


@cache
def _schema(reply_model: type[BaseModel]) -> Mapping[str, Any]:
    return reply_model.model_json_schema()


def _parsed(reply: LLMReply, reply_model: type[_Reply]) -> _Reply:
    """The reply as its model: bare JSON, or JSON after a thought or in a code fence."""
    text = reply.text.rpartition("</think>")[2].strip()
    if reply.finish == "refusal":
        raise Rejected(Reason.REPLY_REFUSAL, f"the server reports a refusal: {text[:80]!r}")
    if reply.finish == "length":
        raise Rejected(Reason.REPLY_TRUNCATED, f"the reply ended after {reply.completion_tokens} tokens")
    if not text:
        raise Rejected(Reason.REPLY_EMPTY, "the reply is empty")
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json").strip()
    try:
        return reply_model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] != "json_invalid":
        place = ".".join(map(str, first["loc"])) or "the reply"
        raise Rejected(Reason.REPLY_SCHEMA, f"{place}: {first['msg']}")
    if text.casefold().startswith(_REFUSALS):
        raise Rejected(Reason.REPLY_REFUSAL, f"the reply refuses: {text[:80]!r}")
    raise Rejected(Reason.REPLY_NOT_JSON, f"the reply is no JSON object: {text[:80]!r}")
