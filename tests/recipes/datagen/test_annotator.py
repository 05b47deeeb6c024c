"""Asking: second tries are told the reason, retries back off, everything is booked, secrets stay inside."""

import asyncio
import json

import pytest

from tests.support.annotator import RuleAnnotator
from tests.support.traces import traces
from tw_recipes.datagen.accounting import Accounts, read_calls
from tw_recipes.datagen.annotator import Annotator, RetryPolicy
from tw_recipes.datagen.limits import Budget, BudgetExhaustedError, RateLimiter
from tw_recipes.datagen.llm import AccessError, EndpointError, LLMReply, Models, Price, TransientError
from tw_recipes.datagen.models import CheckReply, StepsReply
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.reasons import Reason, Rejected
from tw_recipes.datagen.steps import extract_steps

MODELS = Models("rule", {"check": "small"}, {"rule": Price(2.0, 10.0), "small": Price(1.0, 1.0)})
QUICK = RetryPolicy(attempts=4, first_wait_s=0.001, max_wait_s=0.002)
TRACE = traces(1)[0]


class Scripted:
    """Gives the scripted replies in turn; errors are raised."""

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), []

    async def complete(self, request):
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, LLMReply) else LLMReply(reply, "stop", 100, 10)

    async def aclose(self):
        pass


VERDICT = json.dumps({"verdicts": [{"thread": 1, "uses_threads": [], "complete": True, "why": ""}]})


def ask(annotator, check=lambda reply: None):
    values = {"question": "q", "numbered": "L1| a", "threads": []}
    values["threads"] = [{"first_line": 1, "last_line": 1}]
    return annotator.ask("check", CheckReply, check, key="r", **values)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (LLMReply("", "stop"), Reason.REPLY_EMPTY),
        (LLMReply("  \n", "stop"), Reason.REPLY_EMPTY),
        (LLMReply("I can't.", "refusal"), Reason.REPLY_REFUSAL),
        (LLMReply("I'm sorry, but I can't help with that.", "stop"), Reason.REPLY_REFUSAL),
        (LLMReply(VERDICT[:-3], "length"), Reason.REPLY_TRUNCATED),
        (LLMReply(VERDICT[:-3], "stop"), Reason.REPLY_NOT_JSON),
        (LLMReply("Here you are: none.", "stop"), Reason.REPLY_NOT_JSON),
        (LLMReply("[]", "stop"), Reason.REPLY_SCHEMA),
        (LLMReply('{"verdicts": 3}', "stop"), Reason.REPLY_SCHEMA),
        (LLMReply(VERDICT[:-1] + ', "more": 1}', "stop"), Reason.REPLY_SCHEMA),
        (LLMReply(VERDICT.replace("1", '"one"'), "stop"), Reason.REPLY_SCHEMA),
    ],
)
async def test_a_reply_that_cannot_be_read_has_its_reason(reply, reason):
    with pytest.raises(Rejected) as found:
        await ask(Annotator(Scripted(reply, reply), MODELS))
    assert found.value.reason == reason


@pytest.mark.parametrize("text", [VERDICT, f"```json\n{VERDICT}\n```", f"<think>\nHm {{}}\n</think>\n\n{VERDICT}\n"])
async def test_json_after_a_thought_or_in_a_fence_is_read(text):
    reply, problem = await ask(Annotator(Scripted(text), MODELS))
    assert problem is None
    assert reply.verdicts[0].thread == 1


async def test_a_second_try_is_told_what_was_wrong_and_the_last_reply_of_the_right_shape_counts():
    llm = Scripted("nonsense", VERDICT, VERDICT)
    annotator = Annotator(llm, MODELS, options=StageOptions(tries=3))
    bad = Rejected(Reason.CHECK_MISMATCH, "thread 2 is missing")
    reply, problem = await ask(annotator, lambda reply: bad)
    assert (reply.verdicts[0].complete, problem) == (True, bad)
    assert [m["role"] for m in llm.requests[2].messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "nonsense" in llm.requests[1].messages[-1]["content"]
    assert "thread 2 is missing" in llm.requests[2].messages[-1]["content"]
    assert {request.model for request in llm.requests} == {"small"}


async def test_a_busy_endpoint_is_asked_again_and_one_that_stays_away_fails_the_record():
    llm = Scripted(TransientError("busy", 0.01), TransientError("away"), VERDICT)
    annotator = Annotator(llm, MODELS, retry=QUICK)
    await ask(annotator)
    usage = annotator.accounts.usage["check", "small"]
    assert (usage.calls, usage.failed, usage.prompt_tokens, usage.completion_tokens) == (1, 2, 100, 10)
    assert usage.cost == pytest.approx(110e-6)
    with pytest.raises(EndpointError, match="no reply after 4 attempts: away"):
        await ask(Annotator(Scripted(*[TransientError("away")] * 4), MODELS, retry=QUICK))


async def test_waits_grow_with_jitter_and_obey_the_server(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    errors = [TransientError("busy", 7.0), *[TransientError("busy")] * 4]
    annotator = Annotator(Scripted(*errors, VERDICT), MODELS, retry=RetryPolicy(6, 1.0, 4.0))
    await ask(annotator)
    assert waits[0] == 7.0
    assert all(0 <= wait <= 4.0 for wait in waits[1:])
    assert len(set(waits)) == 5


async def test_every_call_is_traced_and_the_accounts_are_read_back(tmp_path):
    path = tmp_path / "calls.jsonl"
    annotator = Annotator(RuleAnnotator(), MODELS, accounts=Accounts(path, MODELS))
    await extract_steps(TRACE, annotator)
    await annotator.aclose()
    lines = list(read_calls(path))
    assert [line["question"] for line in lines] == ["steps"]
    assert lines[0]["messages"][1]["content"].startswith("The problem:\n> ")
    assert json.loads(lines[0]["reply"])["steps"]
    assert set(lines[0]) == {"key", "question", "model", "messages", "reply", "finish", "usage"}
    with path.open("a") as file:
        file.write('{"key": "half')
    again = Accounts(path, MODELS)
    again.close()
    assert again.usage == annotator.accounts.usage
    assert again.total.tokens == annotator.accounts.total.tokens > 0
    assert len(path.read_text().splitlines()) == 1


async def test_secrets_are_neither_traced_nor_told(tmp_path):
    secret = "sk-very-secret"
    path = tmp_path / "calls.jsonl"
    llm = Scripted(TransientError(f"bad key {secret}"), EndpointError(f"key {secret}"), AccessError(f"no {secret}"))
    annotator = Annotator(llm, MODELS, accounts=Accounts(path, MODELS), retry=QUICK, secrets=(secret, ""))
    with pytest.raises(EndpointError):
        await ask(annotator)
    with pytest.raises(AccessError, match=r"no \[redacted\]"):
        await ask(annotator)
    await annotator.aclose()
    assert secret not in path.read_text()
    assert path.read_text().count("[redacted]") == 2


async def test_calls_in_flight_are_bounded():
    class Counting(RuleAnnotator):
        now = most = 0

        async def complete(self, request):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.001)
            self.now -= 1
            return await super().complete(request)

    llm = Counting()
    annotator = Annotator(llm, MODELS, max_calls=3)
    await asyncio.gather(*(extract_steps(trace, annotator) for trace in traces(20)))
    assert llm.most == 3


async def test_the_budget_is_asked_before_and_settled_after():
    budget = Budget(max_tokens=20_000)
    annotator = Annotator(RuleAnnotator(), MODELS, budget=budget, limiter=RateLimiter(10**6, 10**9))
    await extract_steps(TRACE, annotator)
    assert budget.tokens == annotator.accounts.total.tokens > 0
    with pytest.raises(BudgetExhaustedError):
        await asyncio.gather(*(extract_steps(TRACE, annotator) for _ in range(100)))
    assert budget.tokens == annotator.accounts.total.tokens <= 20_000


async def test_one_call_at_least():
    with pytest.raises(ValueError, match="max_calls must be at least 1, got 0"):
        Annotator(RuleAnnotator(), MODELS, max_calls=0)
    with pytest.raises(Rejected):
        await Annotator(Scripted("x", "x"), MODELS).ask(
            "steps", StepsReply, lambda reply: None, key="r", question="q", numbered="L1| a", count=1
        )
