"""Small local HTTP servers that stand in for inference servers: one replays recorded exchanges, one is scripted.

`EngineServer` answers `/v1/completions` in the dialect of vLLM or SGLang from a function of the request, and does
what it is told to go wrong. Both listen on 127.0.0.1 and can be killed in the middle of calls and started again on the
same port.
"""

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tw_recipes.decoding.engine import Completion, Request, Sampling
from tw_recipes.decoding.scripted_engine import ScriptedEngine


class Answer(NamedTuple):
    """What goes back: a status, a body (JSON unless bytes), headers; `sent` cuts the connection after so many bytes."""

    status: int
    body: Any
    headers: Mapping[str, str] = MappingProxyType({})
    sent: int | None = None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int, owner: "LocalServer") -> None:
        self.owner, self.open = owner, set[socket.socket]()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; without this the second waits for an acknowledgement (40 ms a call).
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        owner = self.server.owner
        owner.headers.append(dict(self.headers))
        status, answer, headers, sent = owner.answer(self.command, self.path, body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "text/event-stream" if content.startswith(b"data:") else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:sent])
        if sent is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Tests are quiet."""


class LocalServer:
    """A server in a thread. Subclasses answer.

    Attributes:
        headers: Request headers, in order of arrival.
    """

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self.gone = threading.Event()
        self._listener: _Listener | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(self, method: str, path: str, body: Any) -> Answer:
        raise NotImplementedError

    def start(self) -> None:
        """Listens; after `kill`, on the same port."""
        self.gone = threading.Event()
        self._listener = _Listener(self.port, self)
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Stops listening and cuts every connection, whatever is on it."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.gone.set()
        listener.shutdown()
        listener.server_close()
        for connection in list(listener.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class ReplayServer(LocalServer):
    """Gives recorded answers to requests that hold what was recorded; anything else is 418 and stands in `unknown`."""

    def __init__(self, exchanges: Iterable[dict[str, Any]]) -> None:
        self.exchanges = list(exchanges)
        self.unknown: list[Any] = []
        self.used: Counter[int] = Counter()
        super().__init__()

    def answer(self, method: str, path: str, body: Any) -> Answer:
        """The first unused exchange with this request, or the last used one."""
        found = [
            place
            for place, one in enumerate(self.exchanges)
            if (one["method"], one["path"]) == (method, path) and _holds(body, one["request"])
        ]
        if not found:
            self.unknown.append((method, path, body))
            return Answer(418, {"error": {"message": f"never recorded: {method} {path} {json.dumps(body)}"}})
        place = next((place for place in found if not self.used[place]), found[-1])
        self.used[place] += 1
        answer = self.exchanges[place]["response"]
        return Answer(self.exchanges[place]["status"], answer.encode() if isinstance(answer, str) else answer)


def _holds(body: Any, recorded: dict[str, Any] | None) -> bool:
    return body == recorded if recorded is None else all(body.get(name, _NO) == recorded[name] for name in recorded)


_NO = object()


class EngineServer(LocalServer):
    """Writes what a function of the request says, as vLLM or SGLang would tell it.

    Args:
        write: What would be written if nothing stopped it.
        dialect: "vllm" or "sglang".
        model: Served name.
        max_context: As told in GET /v1/models.
        eos: Ids that the server itself takes for the end of a sequence.
        seconds: Time of a call.
    Attributes:
        fault: Called with the number of the call and its body; names what goes wrong, "" for nothing: "429", "500",
            "hang", "reset", "cut", "abort", "count", "no_ids", "past_stop".
        calls: Bodies of all completion calls, in order of arrival.
        faults: How often each fault happened.
    """

    def __init__(
        self,
        write: Callable[[Request], Any],
        *,
        dialect: str = "vllm",
        model: str = "model",
        max_context: int = 4096,
        eos: tuple[int, ...] = (),
        seconds: float = 0.0,
    ) -> None:
        self.write, self.dialect, self.model, self.max_context, self.eos = write, dialect, model, max_context, eos
        self.seconds = seconds
        self.fault: Callable[[int, dict[str, Any]], str] = lambda number, body: ""
        self.calls: list[dict[str, Any]] = []
        self.faults: Counter[str] = Counter()
        self.cached: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()
        super().__init__()

    def answer(self, method: str, path: str, body: Any) -> Answer:
        if (method, path) == ("GET", "/v1/models"):
            card = {"id": self.model, "object": "model", "owned_by": self.dialect, "max_model_len": self.max_context}
            return Answer(200, {"object": "list", "data": [card]})
        if (method, path) != ("POST", "/v1/completions"):
            return Answer(404, {"error": {"message": f"no route {path}"}})
        with self._lock:
            self.calls.append(body)
            fault = self.fault(len(self.calls), body)
            if fault:
                self.faults[fault] += 1
        self.gone.wait(self.seconds)
        if fault == "hang":
            self.gone.wait(60)
        if fault in ("reset", "hang"):
            return Answer(200, {}, sent=0)
        if fault in ("429", "500"):
            return Answer(int(fault), {"error": {"message": f"no luck: {fault}"}}, {"Retry-After": "0"})
        return self._complete(body, fault)

    def _complete(self, body: dict[str, Any], fault: str) -> Answer:
        stops = () if fault == "past_stop" else (*body["stop_token_ids"], *self.eos)
        bias = {int(token): value for token, value in body.get("logit_bias", {}).items()}
        sampling = Sampling(body["temperature"], body["top_p"], max(body["top_k"], 0), logit_bias=bias)
        request = Request(np.array(body["prompt"], dtype=np.int64), stops, body["max_tokens"], sampling)
        # A bias of 100 makes a token certain, which SGLang's log-probs show and vLLM's do not.
        certain = [token for token, value in bias.items() if value >= 100]
        logprob = 0.0 if certain and self.dialect == "sglang" else -0.5
        engine = ScriptedEngine((lambda request: certain * 9) if certain else self.write, [0], logprob=logprob)
        done: Completion = asyncio.run(engine.generate(request))
        ids = [int(token) for token in done.ids]
        last = ids[-1] if done.finish == "stop" else None
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": [logprob] * len(ids), "tokens": [""] * len(ids)},
            "finish_reason": "abort" if fault == "abort" else done.finish,
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }
        choice["matched_stop" if self.dialect == "sglang" else "stop_reason"] = None if last in self.eos else last
        if fault == "no_ids":
            choice["token_ids"] = None
        if fault == "count":
            choice["token_ids"] = ids[:-1] or [*ids, *ids]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
        usage["prompt_tokens_details"] = {"cached_tokens": self._cached(body["prompt"], ids)}
        reply = {"id": "cmpl-0", "object": "text_completion", "model": self.model, "choices": [choice], "usage": usage}
        content = json.dumps(reply).encode()
        if body.get("stream"):
            content = self._streamed(reply)
        if fault == "cut":
            # Whole by its headers, cut in the JSON; or cut off on the way.
            half = content[: len(content) // 2]
            return Answer(200, half) if len(self.calls) % 2 else Answer(200, content, sent=len(half))
        return Answer(200, content)

    @staticmethod
    def _streamed(reply: dict[str, Any]) -> bytes:
        """Two tokens a chunk, usage in a last chunk without choices."""
        choice, chunks = reply["choices"][0], []
        ids = choice["token_ids"]
        for start in range(0, len(ids), 2):
            part = {"index": 0, "text": "", "token_ids": ids[start : start + 2], "finish_reason": None}
            part["logprobs"] = {"token_logprobs": choice["logprobs"]["token_logprobs"][start : start + 2]}
            if start == 0:
                part["prompt_token_ids"] = choice["prompt_token_ids"]
            if start + 2 >= len(ids):
                part["finish_reason"] = choice["finish_reason"]
            chunks.append({**reply, "choices": [part], "usage": None})
        chunks.append({**reply, "choices": []})
        return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"

    def _cached(self, prompt: list[int], written: list[int], block: int = 16) -> int:
        """Whole blocks that stood in an earlier sequence, never the last token of a prompt: vLLM's rule."""
        with self._lock:
            ends = range(block, len(prompt), block)
            known = next((end - block for end in ends if tuple(prompt[:end]) not in self.cached), None)
            whole = prompt + written
            self.cached |= {tuple(whole[:end]) for end in range(block, len(whole) + 1, block)}
            return (len(prompt) - 1) // block * block if known is None else known
