"""The OpenAI client on a real local server: structured output, refusals, retries, errors by what to do about them."""

import logging

import pytest
from starlette.responses import JSONResponse, Response

from tests.support.annotator import RuleAnnotator, served
from tests.support.traces import traces
from tw_recipes.datagen.annotator import Annotator, RetryPolicy
from tw_recipes.datagen.llm import AccessError, EndpointError, LLMReply, LLMRequest, Models, TransientError
from tw_recipes.datagen.openai_llm import OpenAILLM
from tw_recipes.datagen.pipeline import annotate
from tw_recipes.evaluation.grading import ExactGrader

SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
REQUEST = LLMRequest(
    "steps", "rule", [{"role": "system", "content": "s"}, {"role": "user", "content": "L1| 1: 2\n\nTask: steps"}],
    SCHEMA, 77, "record 5",
)  # fmt: skip


def error(status: int, message: str = "no", **headers: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status, headers=headers)


async def complete(url: str, **options) -> LLMReply:
    llm = OpenAILLM(url, **options)
    try:
        return await llm.complete(REQUEST)
    finally:
        await llm.aclose()


async def test_what_is_sent_and_what_comes_back():
    seen = []
    with served(RuleAnnotator(), refuse=seen.append) as url:
        reply = await complete(url, api_key="sk-x", temperature=0.5, extra={"top_k": 3})
    assert (reply.finish, reply.completion_tokens > 0, reply.text[:9]) == ("stop", True, '{"steps":')
    body = seen[0]
    assert body["headers"]["authorization"] == "Bearer sk-x"
    expected = {"model": "rule", "max_completion_tokens": 77, "user": "record 5", "temperature": 0.5, "top_k": 3}
    assert {name: body[name] for name in expected} == expected
    assert body["response_format"]["json_schema"] == {"name": "steps", "schema": SCHEMA, "strict": True}


async def test_a_server_without_schemas_is_stepped_down_to_and_remembered(caplog):
    seen = []

    def refuse(body):
        seen.append(body.get("response_format", {}).get("type"))
        return error(400, "unknown field response_format") if seen[-1] is not None else None

    with served(RuleAnnotator(), refuse=refuse) as url, caplog.at_level(logging.WARNING):
        llm = OpenAILLM(url)
        for _ in range(2):
            assert (await llm.complete(REQUEST)).text
        await llm.aclose()
    assert seen == ["json_schema", "json_object", None, None]
    assert [record.args for record in caplog.records] == [("json_schema", "json_object"), ("json_object", "none")]


async def test_a_chosen_way_of_structure_is_not_left():
    refuse = lambda body: error(400, "unknown response_format")  # noqa: E731
    with served(RuleAnnotator(), refuse=refuse) as url, pytest.raises(EndpointError, match="HTTP 400"):
        await complete(url, structured="json_schema")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, AccessError), (403, AccessError), (404, AccessError), (400, EndpointError), (413, EndpointError),
     (408, TransientError), (429, TransientError), (500, TransientError), (503, TransientError)],
)  # fmt: skip
async def test_errors_are_sorted_by_what_to_do_about_them(status, kind):
    headers = {"retry-after": "3"} if status == 429 else {}
    refuse = lambda body: error(status, "no", **headers)  # noqa: E731
    with served(RuleAnnotator(), refuse=refuse) as url, pytest.raises(kind) as found:
        await complete(url)
    assert str(status) in str(found.value)
    if status == 429:
        assert found.value.retry_after == 3.0


async def test_no_server_and_no_completion():
    with pytest.raises(TransientError, match="APIConnectionError"):
        await complete("http://127.0.0.1:9/v1")
    said = "expected a chat completion with a choice, got '<html>hello"
    page = lambda body: Response("<html>hello</html>")  # noqa: E731
    with served(RuleAnnotator(), refuse=page) as url, pytest.raises(EndpointError, match=said):
        await complete(url)


async def test_refusals_and_cut_replies_are_seen():
    for finish in ("refusal", "length"):
        tricks = {"steps": lambda request, answer, finish=finish: LLMReply("No.", finish, 5, 2)}
        with served(RuleAnnotator(tricks)) as url:
            assert await complete(url) == LLMReply("No.", finish, 5, 2)


async def test_a_trace_goes_through_a_server_that_is_busy_now_and_then():
    count = 0

    def refuse(body):
        nonlocal count
        count += 1
        return error(503, "busy") if count % 3 == 1 else None

    with served(RuleAnnotator(), refuse=refuse) as url:
        annotator = Annotator(OpenAILLM(url), Models("rule"), retry=RetryPolicy(5, 0.001, 0.002))
        sample = await annotate(traces(1)[0], annotator, ExactGrader())
        await annotator.aclose()
    assert sample.kind == "forkjoin"
    assert annotator.accounts.total.failed >= 2


def test_an_address_with_a_password_and_an_unknown_way_are_refused():
    with pytest.raises(ValueError, match="base_url must not hold a user name or password"):
        OpenAILLM("http://me:secret@localhost/v1")
    with pytest.raises(ValueError, match="structured must be one of auto, json_schema, json_object, none, got 'xml'"):
        OpenAILLM(structured="xml")
