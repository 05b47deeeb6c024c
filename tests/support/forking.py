"""A tiny model that forks: a random Qwen3 taught three trajectories by heart in about two seconds.

Greedy decoding of `PROMPTS[k]` gives `TRAJECTORIES[k]`: a block of two threads, a nested block, a text without a block.
Ids are those of tests/support/trajectories.py, with 11 as the end of a sequence.
"""

from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.support.models import tiny_model
from tests.support.trajectories import COLON, DIGITS, NEWLINE, TAG_IDS
from tw_core import Unit, extract_units
from tw_recipes.decoding.engine import Request

EOS, VOCAB = 11, 120
P, P_, OS, OS_, OL, OL_, T, T_ = range(1, 9)

PROMPTS = tuple([100 + place] * 3 + [NEWLINE] for place in range(3))


def outlines(*numbers: int, plan: int = 110) -> list[int]:
    """A block up to </Outlines>, one outline a number 0..9."""
    return [P, OS, *(i for number in numbers for i in (OL, DIGITS[number], COLON, plan, OL_)), OS_]


def thread(number: int, *body: int) -> list[int]:
    """One thread, header included, as later threads stand in the joined ids."""
    return [T, NEWLINE, DIGITS[number], COLON, *body, T_]


def block(*bodies: list[int]) -> list[int]:
    """A whole block, one thread a body, numbered from 1."""
    threads = [i for number, body in enumerate(bodies, 1) for i in thread(number, *body)]
    return [*outlines(*range(1, len(bodies) + 1)), NEWLINE, *threads, NEWLINE, P_]


TRAJECTORIES = (
    [105, *block([106, 107, NEWLINE], [108, 106, 108, NEWLINE]), 109, EOS],
    [111, *block([112, *block([113], [114, 113]), NEWLINE], [115, NEWLINE]), 105, 116, EOS],
    [106, 105, 117, 118, EOS],
)


def units_of(place: int) -> list[Unit]:
    """The calls of trajectory `place`."""
    return extract_units([*PROMPTS[place], *TRAJECTORIES[place]], TAG_IDS, len(PROMPTS[place]))


@lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    model = tiny_model("qwen3", vocab_size=VOCAB, eos_token_id=EOS)
    units = [unit for place in range(len(PROMPTS)) for unit in units_of(place)]
    width = max(len(context) + len(completion) for context, completion in units)
    ids, labels = np.zeros((len(units), width), np.int64), np.full((len(units), width), -100)
    for row, (context, completion) in enumerate(units):
        start, end = len(context), len(context) + len(completion)
        ids[row, :end] = [*context, *completion]
        labels[row, start:end] = completion
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    final = float(loss.detach())
    assert final < 0.01, f"the model has not learnt its trajectories: loss {final:.3f}"
    return model.state_dict()


def forking_model() -> PreTrainedModel:
    """A fresh copy of the model, in eval mode."""
    model = tiny_model("qwen3", vocab_size=VOCAB, eos_token_id=EOS)
    model.load_state_dict(_weights())
    model.generation_config.eos_token_id = EOS
    return model


def echo_key(request: Request) -> list[int]:
    """A script: a block of two threads in which the first id of the prompt stands wherever a call writes."""
    context = request.context
    own, opened, closed = int(context[0]), np.count_nonzero(context == T), np.count_nonzero(context == T_)
    if T_ in request.stop_ids:
        return [own, int(context[-2]), T_]
    return [P_, own, EOS] if opened and closed == opened else [105, *outlines(1, 2)]
