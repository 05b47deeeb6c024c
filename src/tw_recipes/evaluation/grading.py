"""Grades responses: math-verify in a pool of processes under a clock, or an exact match for tasks.

    with GraderPool(workers=2, timeout_s=5) as grader:
        grade = grader.grade(response, "\\frac{1}{2}")           # any thread
        grade = await grader.grade_async(response, answer)       # any event loop

A worker that runs over its time is killed and replaced; the response gets status "timeout" and the run goes on.
Workers are plain subprocesses that talk over a pipe: nothing is forked from a process that holds CUDA or threads,
and no `__main__` is imported again. Guarded by tests/recipes/evaluation/test_grading.py.
"""

import asyncio
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Protocol, Self

from tw_recipes.evaluation import math_grader
from tw_recipes.evaluation.math_grader import Grade, final_text, last_boxed

__all__ = ["ExactGrader", "Grade", "Grader", "GraderPool", "final_text", "last_boxed"]

_START_S = 120.0  # importing sympy on a busy machine


class Grader(Protocol):
    """What evaluation and rewards ask of a grader."""

    def grade(self, response: str, answer: str) -> Grade:
        """Verdict on one response; never raises for what a model wrote."""

    async def grade_async(self, response: str, answer: str) -> Grade:
        """`grade` without blocking the event loop."""

    def close(self) -> None:
        """Release what the grader holds."""


class ExactGrader:
    r"""The last `\boxed{}` (or, without one, the text after `</think>`) must equal the answer, blanks apart."""

    def grade(self, response: str, answer: str) -> Grade:
        """Verdict on one response."""
        text = final_text(response)
        boxed = last_boxed(text)
        found = boxed if boxed is not None else " ".join(text.split())
        if not found:
            return Grade(False, "unparsable", reason="the response has no text after </think>")
        return Grade("".join(found.split()) == "".join(answer.split()), "graded", found)

    async def grade_async(self, response: str, answer: str) -> Grade:
        """`grade`; it takes microseconds."""
        return self.grade(response, answer)

    def close(self) -> None:
        """Nothing to release."""


class _Worker:
    """One grading process, started on first use and again after it was stopped."""

    def __init__(self, memory_bytes: int):
        self._memory = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def ask(self, response: str, answer: str, timeout_s: float) -> Grade:
        try:
            pipe = self._pipe if self._pipe is not None else self._start()
            pipe.send((response, answer, timeout_s))
            if pipe.poll(timeout_s):
                return Grade(*pipe.recv())
            self.stop()
            return Grade(False, "timeout", reason=f"grading took more than timeout_s={timeout_s:g}")
        except (EOFError, OSError) as error:  # the process died: out of memory, or killed from outside
            self.stop()
            return Grade(False, "error", reason=f"the grading process died ({type(error).__name__})")

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            # -P: this file's folder must not shadow installed packages.
            command = [sys.executable, "-P", "-W", "ignore", math_grader.__file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                [*command, str(self._memory)], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._pipe = ours
        try:
            started = ours.poll(_START_S) and ours.recv() == "ready"
        except EOFError:
            started = False
        if not started:
            self.stop()
            raise RuntimeError(
                "the grading process did not start, its message is above; check that `python -c 'import math_verify'` "
                'works (pip install "threadweaver[recipes]")'
            )
        return ours

    def stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _stop_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()


class GraderPool:
    """math-verify in subprocesses, each answer under a clock.

    Processes start when they are first needed (about a second each) and stay. Safe to call from many threads and event
    loops; close it, or use it as a context manager.

    Args:
        workers: Processes, and answers graded at once.
        timeout_s: Seconds for one response before its process is killed.
        memory_bytes: Address space of a process; more ends in status "error".
    Raises:
        ValueError: `workers` or `timeout_s` is not positive.
    Source:
        math-verify; PITFALLS 28 of the project's design: its signals do not work in threads.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, *, memory_bytes: int = 4 << 30):
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"workers and timeout_s must be positive, got {workers} and {timeout_s}")
        self.timeout_s = timeout_s
        self._workers = [_Worker(memory_bytes) for _ in range(workers)]
        self._free: LifoQueue[_Worker] = LifoQueue()  # last in, first out: few calls at once start few processes
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def grade(self, response: str, answer: str) -> Grade:
        """Verdict on one response; waits for a free process.

        Args:
            response: What the model wrote, without the prompt.
            answer: The reference answer.
        Raises:
            RuntimeError: The pool is closed, or math-verify cannot be imported.
        """
        if not self._finalizer.alive:
            raise RuntimeError("this GraderPool is closed; make a new one")
        worker = self._free.get()
        try:
            return worker.ask(response, answer, self.timeout_s)
        finally:
            self._free.put(worker)

    async def grade_async(self, response: str, answer: str) -> Grade:
        """`grade` without blocking the event loop."""
        return await asyncio.wrap_future(self._threads.submit(self.grade, response, answer))

    def grade_many(self, responses: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """Grades of many responses, in order, as many at once as there are processes.

        Raises:
            ValueError: There are not as many answers as responses.
        """
        if len(responses) != len(answers):
            raise ValueError(f"answers must have one entry per response ({len(responses)}), got {len(answers)}")
        return list(self._threads.map(self.grade, responses, answers))

    def close(self) -> None:
        """Stop the processes; answers in work are finished first, waiting ones are cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
