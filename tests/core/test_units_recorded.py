"""extract_units against the calls recorded from the published controller, where its rules are ours (SPEC section 4)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tw_core import TagIds, extract_units

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "inference_cases.json").read_text())
SPECIALS = GOLDEN["meta"]["tag_ids"]
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")


def _encode(text: str) -> list[int]:
    pieces = _SPLIT.split(text)
    return [i for piece in pieces for i in ([SPECIALS[piece]] if piece in SPECIALS else [100 + ord(c) for c in piece])]


class _RecordedTokenizer:
    """The tokenizer of the recording: one id a character, one a special."""

    encode = staticmethod(lambda text, add_special_tokens=False: _encode(text))

    @staticmethod
    def decode(ids: list[int]) -> str:
        names = {number: name for name, number in SPECIALS.items()}
        return "".join(names.get(i) or chr(i - 100) for i in ids)

    @staticmethod
    def get_vocab() -> dict[str, int]:
        return {chr(code): 100 + code for code in range(128)} | SPECIALS


def _difference(case: dict[str, Any]) -> str | None:
    """Why our rules give other units than the recorded calls; None where they are the same."""
    if "generated" not in case:
        return "the engine raised"
    if not case.get("no_conclusion", True):
        return "the recorded controller injects <Conclusion>; ours is written by the model"
    calls = case["calls"]
    threads = [call for call in calls if "_path_" in call["suffix"]]
    if any(call["matched"] != "</Thread>" for call in threads):
        return "eos or length inside a thread: the recorded ids hold a forced close instead of what was written"
    if not case["generated"].endswith(calls[-1]["out"]):
        return "the recorded result is cut"
    forks = {call["prompt"].rpartition("\n<Thread>\n")[0] for call in threads}
    stale = [call for call in calls if call["prompt"] + call["out"] in forks and "<Outlines>" not in call["out"]]
    return "stale outlines are used again" if stale else None


SAME = [place for place, case in enumerate(GOLDEN["cases"]) if _difference(case) is None]


def test_most_recorded_cases_follow_our_rules() -> None:
    assert len(SAME) >= 30


@pytest.mark.parametrize("place", SAME)
def test_units_are_the_recorded_calls(place: int) -> None:
    case = GOLDEN["cases"][place]
    prompt = _encode(case.get("prompt", GOLDEN["meta"]["defaults"]["prompt"]))
    units = extract_units(prompt + _encode(case["generated"]), TagIds.from_tokenizer(_RecordedTokenizer()), len(prompt))
    expected: list[tuple[str, str]] = []
    for call in case["calls"]:
        # A sequential call that went on after a </Outlines> without a fork is one unit with the call before.
        if expected and call["prompt"] == "".join(expected[-1]):
            expected[-1] = (expected[-1][0], expected[-1][1] + call["out"])
        elif call["out"]:
            expected.append((call["prompt"], call["out"]))
    decode = _RecordedTokenizer.decode
    assert [(decode(u.context.tolist()), decode(u.completion.tolist())) for u in units] == expected
