"""The decoder against the calls and texts recorded from the published controller; every deviation has its reason."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tw_core import TagIds
from tw_core.scanner import id_tags, scan
from tw_core.tags import PARALLEL, THREAD
from tw_recipes.decoding import GREEDY, ForkJoinDecoder, Limits, Rollout, ScriptedEngine

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "inference_cases.json").read_text())
SPECIALS: dict[str, int] = GOLDEN["meta"]["tag_ids"]
DEFAULTS: dict[str, Any] = GOLDEN["meta"]["defaults"]
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")

CONCLUSION = "the recorded controller injects <Conclusion>; ours is written by the model"
STALE = "a stray </Outlines> forks again on the outlines of an earlier block; ours goes on"
EOS = "an end of sequence in a thread ends everything; ours ends that thread alone"
OPEN = "the block is left open; ours closes it"
BUDGET = "only the single call is bounded and the text is cut; ours shares the budget, glue included, and closes"
CALLS = "a bound of 32 rounds ends the text; ours is bounded by tokens and blocks"
DEVIATIONS = {
    2: CONCLUSION,
    9: STALE,
    11: EOS,
    12: EOS,
    13: EOS,
    15: OPEN,
    20: CALLS,
    21: CALLS,
    22: OPEN,
    23: BUDGET,
    24: BUDGET,
    25: BUDGET,
    26: BUDGET,
    27: BUDGET,
    28: OPEN,
    29: BUDGET,
    30: BUDGET,
    32: BUDGET,
    35: STALE,
    36: BUDGET,
    38: CONCLUSION,
    40: STALE,
    41: STALE,
    42: EOS,
    45: OPEN,
    46: STALE,
    53: STALE,
    56: CONCLUSION,
    57: BUDGET,
}
"""Place in the file -> why SPEC section 4 does something else."""


def encode(text: str) -> list[int]:
    pieces = _SPLIT.split(text)
    return [i for piece in pieces for i in ([SPECIALS[piece]] if piece in SPECIALS else [100 + ord(c) for c in piece])]


def decode(ids: Any) -> str:
    names = {number: name for name, number in SPECIALS.items()}
    return "".join(names.get(i) or chr(i - 100) for i in map(int, ids))


class RecordedTokenizer:
    """The tokenizer of the recording: one id a character, one a special."""

    encode = staticmethod(lambda text, add_special_tokens=False: encode(text))
    decode = staticmethod(decode)

    @staticmethod
    def get_vocab() -> dict[str, int]:
        return {chr(code): 100 + code for code in range(128)} | SPECIALS


TAG_IDS = TagIds.from_tokenizer(RecordedTokenizer())


def play(case: dict[str, Any]) -> tuple[Rollout, list[tuple[str, set[str], str]], str]:
    """The rollout, its calls as (prompt, stops, out), and the response."""
    prompt = encode(case.get("prompt", DEFAULTS["prompt"]))
    engine = ScriptedEngine(
        [encode(line) for line in case["script"]],
        [SPECIALS["<eos>"]],
        max_context=case.get("max_model_len", DEFAULTS["max_model_len"]),
    )
    total = case.get("response_length", DEFAULTS["response_length"])
    limits = Limits(max_total_tokens=total, max_thread_tokens=total, max_depth=1)
    rollout = asyncio.run(ForkJoinDecoder(engine, TAG_IDS, limits, GREEDY).decode(prompt))
    calls = [
        (decode(request.context), {decode([stop]) for stop in request.stop_ids}, decode(call.completion))
        for request, call in zip(engine.requests, rollout.calls, strict=True)
    ]
    return rollout, calls, decode(rollout.response_ids)


def recorded(case: dict[str, Any]) -> list[tuple[str, set[str], str]]:
    return [(call["prompt"], set(call["stop"]), call["out"]) for call in case.get("calls", [])]


@pytest.mark.parametrize("place", sorted(set(range(len(GOLDEN["cases"]))) - set(DEVIATIONS)))
def test_calls_stops_and_text_are_the_recorded_ones(place: int) -> None:
    case = GOLDEN["cases"][place]
    _, calls, text = play(case)
    assert calls == recorded(case)
    assert text == case["generated"]


@pytest.mark.parametrize("place", DEVIATIONS)
def test_a_deviation_is_what_its_reason_says(place: int) -> None:
    case, reason = GOLDEN["cases"][place], DEVIATIONS[place]
    rollout, calls, text = play(case)
    theirs, generated = recorded(case), case.get("generated", "")
    assert (calls, text) != (theirs, generated)
    same = next((i for i, pair in enumerate(zip(calls, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
    if reason == CONCLUSION:
        assert case["no_conclusion"] is False
        assert theirs[same][0] == calls[same][0] + "<Conclusion>\n"
    elif reason == STALE:
        assert theirs[same][0].startswith(calls[same][0] + "\n<Thread>\n")
        assert calls[same][0].endswith("</Outlines>")
    elif reason == EOS:
        assert case["eos_seen"] is True
        assert same == len(theirs) < len(calls)
    elif reason == OPEN:
        assert calls == theirs
        assert text == generated.rstrip("\n") + "\n</Parallel>"
    elif reason == CALLS:
        assert same == len(theirs) == 32 < len(calls)
    else:
        bound = min(case.get("response_length", 10**6), case.get("max_model_len", 10**6) - len("Q:"))
        assert rollout.status == "length"
        assert rollout.limits_hit.keys() <= {"max_total_tokens", "max_context"}
        assert len(rollout.response_ids) <= bound + rollout.forced * 2
    tree = scan(id_tags(rollout.ids, TAG_IDS, rollout.prompt_length), rollout.prompt_length, len(rollout.ids))
    assert all(span.closed for span in tree.walk() if span.kind in (PARALLEL, THREAD))
