r"""Records the exchanges with a real server that tests/recipes/decoding/test_recorded_exchanges.py replays.

    python -m tests.engines.record http://127.0.0.1:8000/v1 "vLLM 0.32.0" tests/data/exchanges/vllm-0.32.0.json

The server serves DIR/random of `python -m tests.engines.models DIR`, freshly started: cached tokens are recorded too.
"""

import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.rollouts import tagged_tokenizer
from tests.support.servers import Answer, LocalServer
from tw_recipes.decoding import EngineError, OpenAIEngine, Request, Sampling

CONTEXT = np.arange(20, 84)
FORCED = 7


class Recorder(LocalServer):
    """Passes requests on to another server and keeps both sides."""

    def __init__(self, url: str) -> None:
        self.target, self.exchanges = url.removesuffix("/v1"), list[dict[str, Any]]()
        super().__init__()

    def answer(self, method: str, path: str, body: Any) -> Answer:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        sent = urllib.request.Request(self.target + path, content, headers, method=method)
        try:
            with urllib.request.urlopen(sent, timeout=60) as reply:
                status, text = reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        response = text if text.startswith("data:") else json.loads(text)
        self.exchanges.append({"method": method, "path": path, "request": body, "status": status, "response": response})
        return Answer(status, text.encode())


def requests(eos: int, told: Callable[[list[int]], None]) -> dict[str, Request]:
    """What is asked, by name; tests ask the same."""
    bias = {"temperature": 0.0}
    return {
        "greedy": Request(CONTEXT, (eos,), 8),
        "again": Request(CONTEXT, (eos,), 8),
        "forced stop": Request(CONTEXT, (FORCED, eos), 8, Sampling(**bias, logit_bias={FORCED: 100.0})),
        "end of sequence": Request(CONTEXT, (FORCED, eos), 8, Sampling(**bias, logit_bias={eos: 100.0})),
        "sampled": Request(CONTEXT, (eos,), 8, Sampling(0.5, 0.9, 20), seed=5),
        "streamed": Request(CONTEXT, (eos,), 8, on_tokens=told),
        "too long": Request(np.full(600, 20), (eos,), 8),
        "clamped": Request(np.full(500, 20), (), 64, Sampling(**bias, logit_bias={eos: -100.0})),
    }


def ask_all(engine: OpenAIEngine, told: Callable[[list[int]], None]) -> dict[str, Any]:
    """The completion of each request, or its error; one after another."""

    async def run() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, request in requests(engine.eos_ids[0], told).items():
            try:
                found[name] = await engine.generate(request)
            except EngineError as error:
                found[name] = error
        await engine.aclose()
        return found

    return asyncio.run(run())


def main(url: str, server: str, out: str) -> None:
    """Asks everything through a recorder and writes what was said."""
    with Recorder(url) as recorder:
        engine = OpenAIEngine(recorder.url, "model", tagged_tokenizer(), max_context=100_000, attempts=1)
        for name, answer in ask_all(engine, lambda ids: None).items():
            print(name, answer)
        lines = ",\n".join(json.dumps(exchange) for exchange in recorder.exchanges)
        Path(out).write_text(f'{{"server": {json.dumps(server)}, "exchanges": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
