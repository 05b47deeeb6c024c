"""WaveEngine: a listener that raises or cancels ends its own call; the others of the wave have their results."""

import asyncio

import numpy as np
import pytest

from tw_recipes.decoding.engine import Completion, Request
from tw_recipes.decoding.waves import WaveEngine


class Echo(WaveEngine):
    """Writes the end of sequence to every call."""

    async def _complete(self, requests):
        return [Completion(np.array([2])) for _ in requests]


@pytest.fixture
def engine():
    return Echo([2], 97, None, 8)


def request(on_tokens=None):
    return Request(np.array([3, 4]), (2,), 1, on_tokens=on_tokens)


def broken(ids):
    raise RuntimeError("no display")


async def test_what_a_listener_raises_reaches_its_caller_alone(engine):
    """It ended the worker of the wave before: no call of the wave ever came back."""
    calls = (engine.generate(request(listener)) for listener in (None, broken, None))
    found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    assert [str(found[1]), *(found[place].ids.tolist() for place in (0, 2))] == ["no display", [2], [2]]
    assert (await asyncio.wait_for(engine.generate(request()), 10)).ids.tolist() == [2]


async def test_a_listener_may_cancel_its_call(engine):
    """The result of a cancelled call was set, which raised in the worker of the wave."""
    task = asyncio.create_task(engine.generate(request(lambda ids: task.cancel())))
    found = await asyncio.wait_for(asyncio.gather(task, engine.generate(request()), return_exceptions=True), 10)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1].ids.tolist() == [2]
