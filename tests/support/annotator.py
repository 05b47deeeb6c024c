"""A rule-based annotator that knows the sum-of-products task, in this process or behind a real HTTP server.

It reads nothing but the messages, as a model would: numbered lines are found by their marks, threads by theirs. The
steps of the task are its products and its sum, the products are the threads, their labels ("2: ") are the references
to remove, and the factors are the outline, as in the task's own fork/join solutions.
"""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tw_recipes.datagen.llm import LLMReply, LLMRequest

_LINE = re.compile(r"^L(\d+)\| ?(.*)$", re.MULTILINE)
_PART = re.compile(r"^Thread (\d+): L(\d+)-L(\d+)$", re.MULTILINE)
_BODY = re.compile(r"^Thread (\d+):\n((?:> .*(?:\n|$))+)", re.MULTILINE)
_TERM = re.compile(r"(\d): \d")

Answer = dict[str, Any] | str | LLMReply
"""A reply as an object, as raw text, or whole."""


class RuleAnnotator:
    """Answers the generator's questions about sums of products.

    Args:
        tricks: By kind of question: takes the request and the honest answer, gives what is answered instead.
        latency_s: Before every answer.
    """

    def __init__(
        self, tricks: Mapping[str, Callable[[LLMRequest, dict[str, Any]], Answer]] | None = None, latency_s: float = 0.0
    ) -> None:
        self.tricks, self.latency_s = dict(tricks or {}), latency_s
        self.asked: list[str] = []

    async def complete(self, request: LLMRequest) -> LLMReply:
        self.asked.append(request.question)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        prompt = request.messages[1]["content"]
        answer: Answer = getattr(self, request.question)(prompt)
        if request.question in self.tricks:
            answer = self.tricks[request.question](request, answer)
        if isinstance(answer, LLMReply):
            return answer
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return LLMReply(text, "stop", sum(len(m["content"]) for m in request.messages) // 4, len(text) // 4)

    async def aclose(self) -> None:
        pass

    def steps(self, prompt: str) -> dict[str, Any]:
        steps, terms = [], _terms(prompt)
        if terms and terms[0][1] > 1:
            steps.append({"title": "begin", "first_line": 1, "last_line": terms[0][1] - 1, "substeps": []})
        for name, first, last in terms:
            steps.append({"title": f"product {name}", "first_line": first, "last_line": last, "substeps": []})
        count, end = len(_LINE.findall(prompt)), steps[-1]["last_line"] if steps else 0
        return {"steps": [*steps, {"title": "sum", "first_line": end + 1, "last_line": count, "substeps": []}]}

    def blocks(self, prompt: str) -> dict[str, Any]:
        threads = [{"first_line": first, "last_line": last} for _, first, last in _terms(prompt)]
        return {"blocks": [{"why": "products know nothing of each other", "threads": threads}] if threads else []}

    def check(self, prompt: str) -> dict[str, Any]:
        return {
            "verdicts": [
                {"thread": int(number), "uses_threads": [], "complete": True, "why": "a product"}
                for number, _, _ in _PART.findall(prompt)
            ]
        }

    def rewrite(self, prompt: str) -> dict[str, Any]:
        edits = []
        for number, body in thread_bodies(prompt):
            label = _TERM.match(body)
            if label:
                edits.append(
                    {"thread": number, "find": label[0] + body[label.end()], "replace": label[0][3:] + body[4]}
                )
        return {"edits": edits, "after_ok": True, "after_why": ""}

    def outlines(self, prompt: str) -> dict[str, Any]:
        return {"outlines": [{"thread": n, "outline": f"{body[0]}w*{body[0]}y"} for n, body in thread_bodies(prompt)]}


def thread_bodies(prompt: str) -> list[tuple[int, str]]:
    """(number, text) of the threads that a prompt shows."""
    found = []
    for number, quoted in _BODY.findall(prompt):
        found.append((int(number), "\n".join(line[2:] for line in quoted.rstrip("\n").split("\n"))))
    return found


def _terms(prompt: str) -> list[tuple[str, int, int]]:
    """(name, first line, last line) of the products in a numbered trace."""
    terms: list[tuple[str, int, int]] = []
    begun: tuple[str, int] | None = None
    for number, line in _LINE.findall(prompt):
        if label := _TERM.match(line):
            begun = label[1], int(number)
        elif line.startswith("=") and begun is not None:
            terms.append((*begun, int(number)))
            begun = None
    return terms


@contextmanager
def served(annotator: Any, *, refuse: Callable[[dict[str, Any]], Any] | None = None) -> Iterator[str]:
    """Run an annotator behind an OpenAI-compatible HTTP server in a thread; gives its base URL.

    Args:
        annotator: Answers requests; the kind of question is the schema's name.
        refuse: Looks at a request's body (with "headers") and gives a starlette response, or None to answer.
    """
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def completions(http: Request) -> JSONResponse:
        body = await http.json()
        refusal = refuse({**body, "headers": dict(http.headers)}) if refuse is not None else None
        if refusal is not None:
            return refusal
        request = LLMRequest(
            question_of(body), body["model"], body["messages"], {}, body["max_completion_tokens"], body.get("user", "")
        )
        return JSONResponse(chat_completion(await annotator.complete(request), body["model"]))

    app = Starlette(routes=[Route("/v1/chat/completions", completions, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(10)


def question_of(body: Mapping[str, Any]) -> str:
    """Which question a request asks: by its schema, or by the prompt."""
    shape = body.get("response_format", {}).get("json_schema")
    if shape is not None:
        return shape["name"]
    return re.search(r"^Task: (\w+)$", body["messages"][1]["content"], re.MULTILINE)[1]


def chat_completion(reply: LLMReply, model: str) -> dict[str, Any]:
    """A reply as the endpoint sends it."""
    refused = reply.finish == "refusal"
    said = {"content": None, "refusal": reply.text} if refused else {"content": reply.text}
    finish = "length" if reply.finish == "length" else "stop"
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", **said}, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }
