"""Fixtures of the engine tests: a tokenizer with the tags, and a scripted server that speaks HTTP."""

import pytest

from tests.support.rollouts import tagged_tokenizer, text_engine
from tests.support.servers import EngineServer


@pytest.fixture(scope="session")
def tokenizer():
    return tagged_tokenizer()


@pytest.fixture
def serve(tokenizer):
    """Starts scripted servers: fork/join text for every prompt unless told otherwise; all are stopped at the end."""
    running = []

    def start(write=None, **options):
        options.setdefault("eos", (tokenizer.eos_token_id,))
        running.append(EngineServer(write or text_engine(tokenizer).script, **options))
        return running[-1]

    yield start
    for server in running:
        server.kill()
