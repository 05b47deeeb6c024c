"""Is this response's final answer right? The pure function, and the process that runs it under a clock.

`GraderPool` (grading.py) starts this file as a program: math-verify bounds its time with signals, which work only in
a main thread and not inside sympy's C loops, so it gets no time-out here and the whole process is the unit that is
stopped. The file imports the standard library alone until it grades.
Guarded by tests/recipes/evaluation/test_grading.py.
"""

import contextlib
import logging
import re
import signal
import sys
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

THINK_END = "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_BLANKS = re.compile(r"\\[!,;: ]|[\s$]+")

Status = Literal["graded", "timeout", "unparsable", "error"]


class Grade(NamedTuple):
    """Verdict on one response.

    Attributes:
        correct: Whether the final answer equals the reference; False unless `status` is "graded".
        status: "graded"; "unparsable": the response has no readable final answer; "timeout"; "error".
        extracted: The answer that was compared, None if there was none.
        reason: Why it is not simply graded, or how it was compared; empty if there is nothing to say.
    """

    correct: bool
    status: Status
    extracted: str | None = None
    reason: str = ""


def final_text(response: str) -> str:
    """The part of a response that counts: what follows the last `</think>`, all of it if there is none."""
    return response.rpartition(THINK_END)[2]


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}`, braces balanced; None without one."""
    for start in reversed([match.end() for match in _BOXED.finditer(text)]):
        depth, at = 1, start
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            return text[start : at - 1].strip()
    return None


def plain(text: str) -> str:
    r"""LaTeX text without `\text{}` wrappers, dollar signs and blanks, for answers that are words."""
    return _BLANKS.sub("", _WORDS.sub(r"\1", text)).strip(".").casefold()


def grade_math(response: str, answer: str) -> Grade:
    r"""Compare a response with a reference by math-verify, without any bound on time.

    The last `\boxed{}` of the text after `</think>` is the answer; earlier boxes do not count. A text without a box is
    searched by math-verify's own rules. A reference that is no mathematics (a name) is compared as text.

    Args:
        response: What the model wrote, without the prompt.
        answer: The reference, with or without dollar signs or a box.
    """
    from math_verify import parse, verify

    gold_text = last_boxed(answer) or answer.strip()
    if not gold_text.strip("$ "):
        return Grade(False, "error", reason=f"the reference answer is empty: {answer!r}; correct the data set")
    text = final_text(response)
    boxed = last_boxed(text)
    if boxed is not None and plain(boxed) == plain(gold_text):
        return Grade(True, "graded", boxed)
    gold = parse(_as_math(gold_text), parsing_timeout=None)
    if not gold or isinstance(gold[0], str):
        if boxed is None:
            return Grade(False, "unparsable", reason="the response has no \\boxed{} to compare with a textual answer")
        return Grade(False, "graded", boxed, "compared as text: the reference is no mathematical expression")
    found = parse(_as_math(boxed) if boxed is not None else text, parsing_timeout=None)
    if not found:
        return Grade(False, "unparsable", boxed, "no mathematical expression in the final answer")
    correct = verify(gold, found, timeout_seconds=None, raise_on_error=True)
    return Grade(bool(correct), "graded", boxed if boxed is not None else str(found[-1]))


def _as_math(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"


def serve(pipe: Connection, memory_bytes: int) -> None:
    """Answer (response, answer, seconds) with a Grade until the other end closes."""
    import math_verify  # noqa: F401  (pay the import before the first clock starts)

    logging.disable(logging.WARNING)  # math-verify warns that its own time-outs are off
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))  # 9^{9^{9^9}} must not take the machine
    pipe.send("ready")
    while True:
        try:
            response, answer, seconds = pipe.recv()
        except EOFError:
            return
        # The parent stops a slow job by killing this process; the alarm's default action does if the parent is gone.
        signal.alarm(int(seconds) + 10)
        try:
            grade = grade_math(response, answer)
        except (Exception, RecursionError, MemoryError) as error:
            grade = Grade(False, "error", reason=f"{type(error).__name__}: {error}"[:500])
        signal.alarm(0)
        pipe.send(tuple(grade))


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as end:
        serve(end, int(sys.argv[2]))
