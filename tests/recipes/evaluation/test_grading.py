"""Grading: the answer that counts, statuses, and a pool that survives what it grades."""

import asyncio
import os
import signal
import threading
import time

import pytest

from tw_recipes.evaluation.grading import ExactGrader, GraderPool
from tw_recipes.evaluation.math_grader import final_text, grade_math, last_boxed

# sympy evaluates the power itself: minutes, in one C call that no Python signal handler interrupts.
ENDLESS = r"\boxed{12345^{99999999}}"


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=20) as pool:
        yield pool


@pytest.mark.parametrize(
    ("response", "answer", "correct", "status"),
    [
        (r"so \boxed{\frac12}", "0.5", True, "graded"),
        (r"\boxed{33}", "033", True, "graded"),
        (r"\boxed{x^2+1}", "1+x^2", True, "graded"),
        (r"\boxed{(3,\pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True, "graded"),
        (r"\boxed{\text{Evelyn}}", "Evelyn", True, "graded"),
        (r"\boxed{2, -2}", "-2, 2", True, "graded"),
        ("the answer is $42$.", "42", True, "graded"),
        (r"\boxed{1} no, \boxed{2}", "1", False, "graded"),  # hedging: the last box counts
        (r"<think>\boxed{3}</think> I do not know", "3", False, "unparsable"),
        (r"<think>\boxed{4}</think> \boxed{ 3 }", "3", True, "graded"),
        (r"<think> \boxed{3}", "3", True, "graded"),  # no </think>: all of it counts
        ("nothing here", "3", False, "unparsable"),
        ("", "3", False, "unparsable"),
        (r"\boxed{3", "3", False, "unparsable"),  # cut off inside the box
        (r"\boxed{5}", "  ", False, "error"),
    ],
)
def test_verdicts(pool, response, answer, correct, status):
    grade = pool.grade(response, answer)
    assert (grade.correct, grade.status) == (correct, status), grade


def test_last_boxed_balances_braces():
    assert last_boxed(r"\boxed{1} and \boxed{\frac{a}{b}}.") == r"\frac{a}{b}"
    assert last_boxed(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_boxed(r"\boxed{1} \boxed{2") == "1"
    assert last_boxed("none") is None
    assert final_text("a</think>b</think>c") == "c"


def test_a_slow_answer_is_a_timeout_and_the_pool_goes_on():
    with GraderPool(workers=1, timeout_s=1.5) as pool:
        assert pool.grade(r"\boxed{1}", "1").correct
        began = time.perf_counter()
        grade = pool.grade(ENDLESS, "3")
        assert (grade.correct, grade.status) == (False, "timeout")
        assert "timeout_s=1.5" in grade.reason
        assert time.perf_counter() - began < 30
        assert pool.grade(r"\boxed{1}", "1").correct


def test_a_killed_worker_is_an_error_and_is_replaced():
    with GraderPool(workers=1, timeout_s=60) as pool:
        assert pool.grade(r"\boxed{1}", "1").correct
        process = pool._workers[0]._process
        timer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
        timer.start()
        grade = pool.grade(ENDLESS, "3")
        timer.join()
        assert (grade.correct, grade.status) == (False, "error")
        assert "died" in grade.reason
        assert pool.grade(r"\boxed{1}", "1").correct


def test_threads_and_tasks_share_the_pool(pool):
    results = pool.grade_many([rf"\boxed{{{n}}}" for n in range(30)], ["7"] * 30)
    assert [n for n, grade in enumerate(results) if grade.correct] == [7]
    with pytest.raises(ValueError, match=r"one entry per response \(2\), got 1"):
        pool.grade_many(["1", "2"], ["1"])

    async def many():
        return await asyncio.gather(*(pool.grade_async(rf"\boxed{{{n}}}", str(n % 5)) for n in range(20)))

    assert sum(grade.correct for grade in asyncio.run(many())) == 5


def test_the_pool_starts_lazily_closes_its_processes_and_says_that_it_is_closed():
    pool = GraderPool(workers=3, timeout_s=20)
    assert all(worker._process is None for worker in pool._workers)
    pool.grade(r"\boxed{1}", "1")
    started = [worker._process for worker in pool._workers if worker._process is not None]
    assert len(started) == 1
    pool.close()
    assert started[0].poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade("1", "1")
    with pytest.raises(ValueError, match="workers and timeout_s must be positive, got 0"):
        GraderPool(workers=0)


def test_the_pure_function_works_in_a_thread():
    """math-verify raises in threads when it is given a time-out."""
    found = []
    thread = threading.Thread(target=lambda: found.append(grade_math(r"\boxed{\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert found[0].correct


def test_exact_grader():
    grader = ExactGrader()
    assert grader.grade(r"x \boxed{ 1 2 }", "12").correct
    assert not grader.grade(r"x \boxed{12.0}", "12").correct
    assert grader.grade("<think>9</think>\n12\n", "12").correct
    assert grader.grade("<think>12</think>", "12").status == "unparsable"
