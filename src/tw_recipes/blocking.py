"""Runs a coroutine to its end for a caller that is not async, inside a running event loop (a notebook) too.

Tests: tests/recipes/test_blocking.py.
"""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; where this thread's event loop is running, a thread of its own runs it meanwhile.

    Raises:
        Exception: What `work` raises.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="blocking") as pool:
        return pool.submit(asyncio.run, work).result()
