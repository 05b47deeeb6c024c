"""What a decoder asks of an engine: one call, ids in and ids out.

    Request  ──generate──►  Completion            EngineError: the call is lost, with the reason

An engine keeps no state of a trajectory; `Request.key` is the same for all calls of one trajectory, so that a
router can keep them on the replica that holds their prefix. Every completion is checked by `check_completion`,
whatever engine it comes from: an engine that ignores a stop id must not go unnoticed.

Tests: tests/recipes/decoding/test_engine.py.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from tw_core._ids import as_ids
from tw_core.errors import ThreadWeaverError, TrieError

Finish = Literal["stop", "length"]


class EngineError(ThreadWeaverError):
    """An engine call that gave no usable completion; the message names the engine and the reason."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps everything.
        top_k: 0 keeps everything.
        seed: Start of the seeds of the single calls (each call gets its own), None for none.
        logit_bias: Token id -> addend to its logit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; use 1 to keep every token")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0)
"""The most probable token, always."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One engine call.

    Attributes:
        context: What the engine reads. Shape (C,), int64, C >= 1.
        stop_ids: Ids that end the call; the id itself is part of the completion. End-of-sequence ids are among them.
        max_tokens: The most tokens to write, >= 1.
        sampling: How.
        key: Affinity key, the same for all calls of one trajectory.
        seed: Seed of this call, None for none.
        on_tokens: Called with new ids as they come, by engines that can; in the event loop's thread.
    """

    context: np.ndarray
    stop_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    key: str = ""
    seed: int | None = None
    on_tokens: Callable[[list[int]], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What an engine wrote.

    Attributes:
        ids: Shape (G,), int64; the stop id, if one was met, is the last.
        logprobs: Natural logarithms of the probabilities of `ids`. Shape (G,), float64; None if the engine gives none.
        finish: "stop" at a stop id, "length" otherwise.
        cached_tokens: How many context tokens came from the engine's prefix cache, None if it does not say.
        replica: Who answered, "" if there is one.
        attempts: Tries it took, 1 without a retry.
    """

    ids: np.ndarray
    logprobs: np.ndarray | None = None
    finish: Finish = "stop"
    cached_tokens: int | None = None
    replica: str = ""
    attempts: int = 1


@runtime_checkable
class Engine(Protocol):
    """Anything that completes token ids.

    Attributes:
        eos_ids: Ids that end a sequence.
        max_context: The most tokens of context and completion together, None if unbounded.
    """

    eos_ids: tuple[int, ...]
    max_context: int | None

    async def generate(self, request: Request) -> Completion:
        """Completes one context.

        Raises:
            EngineError: No completion, after the engine's own retries: this trajectory ends, others go on. (So it is
                with any exception that is not a ValueError.)
            ValueError: Misuse: no request like this one can ever be served. It reaches the caller of the decoder.
        """
        ...

    async def aclose(self) -> None:
        """Gives back what the engine holds (connections, caches); the next call starts it again."""
        ...


def check_completion(request: Request, completion: Completion) -> Completion:
    """Returns `completion`, with `ids` as int64 and `finish` by the last id, if it can be an answer to `request`.

    Raises:
        EngineError: Ids that are none, too many of them, a stop id that did not stop, log-probs that are no numbers
            or not one a token, or a stop at an id that is not a stop id.
    """
    stops, logprobs = request.stop_ids, completion.logprobs
    try:
        ids = as_ids(completion.ids, "ids")
    except TrieError as problem:
        raise EngineError(f"the engine gave no token ids: {problem}") from problem
    if len(ids) > request.max_tokens:
        raise EngineError(f"the engine wrote {len(ids)} tokens where max_tokens={request.max_tokens}")
    if logprobs is not None and len(logprobs) != len(ids):
        raise EngineError(f"the engine gave {len(logprobs)} log-probs for {len(ids)} tokens")
    if logprobs is not None and not np.isfinite(logprobs).all():
        raise EngineError("the engine gave log-probs that are no finite numbers")
    met = is_any(ids, stops)
    if met[:-1].any():
        place = int(met.argmax())
        raise EngineError(
            f"the engine wrote {len(ids) - place - 1} tokens past the stop id {int(ids[place])}: it ignores stop ids; "
            "use a server that honours stop_token_ids (vLLM, SGLang)"
        )
    if completion.finish == "stop" and len(ids) and not met[-1]:
        raise EngineError(
            f"the engine stopped at id {int(ids[-1])}, which is none of the stop ids {list(stops)}; "
            "if it ends sequences, add it to eos_ids"
        )
    # Engines name the stop at the last allowed token differently; the id says what happened.
    finish: Finish = "stop" if len(ids) and met[-1] else "length"
    if finish == completion.finish and ids is completion.ids:
        return completion
    return replace(completion, ids=ids, finish=finish)


def is_any(ids: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """Which of `ids` are one of a few wanted ids. Shape of `ids`, bool. (For a few, np.isin is five times slower.)"""
    met = np.zeros(ids.shape, dtype=bool)
    for token in wanted:
        met |= ids == token
    return met


def stable_seed(*parts: Any) -> int:
    """A 31-bit seed from anything with a stable repr: the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") & 0x7FFFFFFF
