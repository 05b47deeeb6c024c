"""Servers of the engine tests: two vLLM processes, or the one that REAL_SERVER_URL and REAL_SERVER_MODEL name.

REAL_SERVER_MODEL is the folder that the server was started with, made by `python -m tests.engines.models DIR`.
"""

import json
import os
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from tests.engines.forced import Bench
from tests.engines.models import load_case, random_case, trained_case
from tests.engines.process import Server
from tw_recipes.rollout_command import load_tokenizer

EXTERNAL = os.environ.get("REAL_SERVER_URL")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(1200))  # the first test waits for both servers


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Both servers, starting while the second model is trained."""
    if EXTERNAL:
        pytest.skip("REAL_SERVER_URL is set: the server is not ours to start and kill")
    folder = tmp_path_factory.mktemp("engines")
    found, running = {}, []
    try:
        for name, make in (("random", random_case), ("trained", trained_case)):
            case = make(folder / name)
            running.append(Server(case.folder, folder / f"{name}.log"))
            running[-1].start()
            found[name] = (case, running[-1])
        for server in running:
            server.wait()
        yield found
    finally:
        for server in running:
            server.stop()


@pytest.fixture(scope="session", params=["external"] if EXTERNAL else ["random", "trained"])
def bench(request):
    """One served model with what it is compared to."""
    if EXTERNAL:
        if "REAL_SERVER_MODEL" not in os.environ:
            pytest.fail("set REAL_SERVER_MODEL to the folder that the server serves (tests/engines/models.py)")
        case = load_case(Path(os.environ["REAL_SERVER_MODEL"]))
        with urllib.request.urlopen(f"{EXTERNAL}/models", timeout=10) as answer:
            server = SimpleNamespace(url=EXTERNAL, model=json.load(answer)["data"][0]["id"])
    else:
        case, server = request.getfixturevalue("processes")[request.param]
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype="float32").eval()
    return Bench(case, server, model, load_tokenizer(str(case.folder)))
