"""Fork/join decoding on any engine: the public class, which runs many trajectories at once.

    decode      one prompt  ─► Rollout
    stream      an iterable of prompts ─► (place, Rollout) as they finish, bounded memory
    decode_all  the same for callers that are not async

What one trajectory does is in `trajectory.py`.

Tests: tests/recipes/decoding/test_decoder.py. Source: arXiv:2512.07843, section 3.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import count
from typing import Any

from tw_core import TagIds
from tw_core._ids import as_ids
from tw_recipes.blocking import run_blocking
from tw_recipes.decoding.engine import Engine, Sampling, stable_seed
from tw_recipes.decoding.limits import Limits
from tw_recipes.decoding.rollout import Event, Rollout
from tw_recipes.decoding.trajectory import Setup, Trajectory


class ForkJoinDecoder:
    """Decodes prompts on an engine, forking where the model asks for it.

    One decoder serves any number of trajectories at once, all in one event loop at a time.

    Args:
        engine: Anything with the `Engine` protocol.
        tag_ids: Tags and glue of the tokenizer, `TagIds.from_tokenizer(tokenizer)`.
        limits: Budgets of each trajectory.
        sampling: How tokens are drawn.
        eos_ids: Ids that end a response. Defaults to the engine's.
        max_calls: Back-pressure: the most engine calls in flight; further ones wait in order.
        warm_prefix: At a fork, first send the shared prefix alone for one token, which is thrown away, and the
            threads when it is back. For engines that cache a prefix only after a call that held it has ended.
    Raises:
        ValueError: The engine knows no end-of-sequence id and none is given.
    """

    def __init__(
        self,
        engine: Engine,
        tag_ids: TagIds,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        *,
        eos_ids: Sequence[int] | None = None,
        max_calls: int = 1024,
        warm_prefix: bool = False,
    ) -> None:
        eos = tuple(engine.eos_ids if eos_ids is None else eos_ids)
        if not eos:
            raise ValueError("eos_ids must hold at least one id, got none from the engine; pass eos_ids=[...]")
        if max_calls < 1:
            raise ValueError(f"max_calls must be >= 1, got {max_calls}")
        # Raises now, not in the middle of a run, where the glue is unknown.
        tag_ids.forced_block_close, tag_ids.label("1")
        structure = set(tag_ids.ids) & set(eos)
        if structure:
            raise ValueError(f"eos_ids must not be tags, got {sorted(structure)}; pass the model's end-of-sequence ids")
        self.max_calls = max_calls
        self._setup = Setup(engine, tag_ids, limits or Limits(), sampling or Sampling(), eos, warm_prefix)
        self._running: dict[str, Trajectory] = {}
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._setup.engine

    @property
    def tag_ids(self) -> TagIds:
        """Tags and glue."""
        return self._setup.tag_ids

    @property
    def limits(self) -> Limits:
        """Budgets of each trajectory."""
        return self._setup.limits

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return self._setup.sampling

    async def decode(
        self, prompt_ids: Any, key: str | None = None, *, on_event: Callable[[Event], None] | None = None
    ) -> Rollout:
        """Decodes one prompt.

        Args:
            prompt_ids: Shape (P,), P >= 1.
            key: Names the trajectory: affinity key of its calls, part of their seeds. Defaults to a digest of the
                prompt.
            on_event: Called at every step, in the event loop; it must not block, and what it raises ends the trajectory
                and is raised here.
        Returns:
            The rollout; an engine's failure is its status, not an exception.
        Raises:
            TrieError: `prompt_ids` are no token ids.
            ValueError: The prompt is empty, a trajectory with this key is in flight, or the engine says that it
                cannot serve such requests at all.
        """
        prompt = as_ids(prompt_ids, "prompt_ids")
        if not len(prompt):
            raise ValueError("prompt_ids must hold at least one id, got none; encode the prompt with its chat template")
        if key is None:
            name = f"prompt-{stable_seed(prompt.tobytes()):08x}"
            key = next(found for place in count() if (found := f"{name}-{place}") not in self._running)
        if key in self._running:
            raise ValueError(f"key {key!r} is already in flight; give every trajectory its own key")
        trajectory = Trajectory(self._setup, prompt, key, self._semaphore(), on_event)
        self._running[key] = trajectory
        timer = None
        if self.limits.max_seconds is not None:
            timer = asyncio.get_running_loop().call_later(self.limits.max_seconds, trajectory.cancel, "max_seconds")
        try:
            return await trajectory.run()
        finally:
            del self._running[key]
            if timer is not None:
                timer.cancel()

    def cancel(self, key: str) -> bool:
        """Stops a trajectory in flight (call it in the event loop); its `decode` returns with status "cancelled".

        Returns:
            Whether there was one. (Cancelling the task of `decode` instead ends it without a result.)
        """
        if (trajectory := self._running.get(key)) is None:
            return False
        trajectory.cancel("cancelled by the caller")
        return True

    async def stream(
        self, prompts: Iterable[Any], keys: Iterable[str] | None = None, *, max_trajectories: int = 4096
    ) -> AsyncIterator[tuple[int, Rollout]]:
        """Decodes prompts as they come from an iterable; yields (place, rollout) as they finish.

        Args:
            prompts: Ids each; drawn as there is room.
            keys: One a prompt. Defaults to its place.
            max_trajectories: The most prompts and results held at a time.
        Raises:
            ValueError: There are fewer keys than prompts, or as in `decode`; the other trajectories are cancelled.
        """
        if max_trajectories < 1:
            raise ValueError(f"max_trajectories must be >= 1, got {max_trajectories}")
        names = map(str, count()) if keys is None else iter(keys)
        source = enumerate(prompts)
        waiting: set[asyncio.Task[tuple[int, Rollout]]] = set()
        # Not asyncio.wait: that looks at every waiting task each time one is done.
        finished: asyncio.Queue[asyncio.Task[tuple[int, Rollout]]] = asyncio.Queue()
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < max_trajectories:
                    if (entry := next(source, None)) is None:
                        more = False
                        break
                    if (key := next(names, None)) is None:
                        raise ValueError(
                            f"keys must have one entry per prompt, got {entry[0]}; pass as many as prompts"
                        )
                    task = asyncio.create_task(self._numbered(entry[0], entry[1], key))
                    task.add_done_callback(finished.put_nowait)
                    waiting.add(task)
                if waiting:
                    task = await finished.get()
                    waiting.discard(task)
                    yield task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _numbered(self, place: int, prompt: Any, key: str) -> tuple[int, Rollout]:
        return place, await self.decode(prompt, key)

    def decode_all(self, prompts: Iterable[Any], keys: Iterable[str] | None = None) -> list[Rollout]:
        """Decodes all prompts and returns their rollouts in order; for callers that are not async.

        Works inside a running event loop too (a notebook): then a thread of its own runs the decoding. The engine
        is closed at the end, so that a model shared with training is as it was; the next call starts it again.
        """
        return run_blocking(self._all(prompts, keys))

    async def _all(self, prompts: Iterable[Any], keys: Iterable[str] | None) -> list[Rollout]:
        try:
            found = [entry async for entry in self.stream(prompts, keys)]
        finally:
            await self.engine.aclose()
        return [rollout for _, rollout in sorted(found, key=lambda entry: entry[0])]

    def _semaphore(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = (loop, asyncio.Semaphore(self.max_calls))
        return self._gate[1]
