"""Runs records through the stages, many at once, each from where an earlier run left it.

    traces ──► at most `concurrency` records in flight ──► steps ─► blocks ─► rewrite ─► outlines ─► filter ──► store
                                                            (a stage that the store has is not asked again)

A record ends as a sample or fails by itself; the run ends early when the budget is used up or the endpoint refuses
everybody. What a record becomes depends on the replies alone, never on timing, so that a run that was killed and gone
on with gives the same data.
Guarded by tests/recipes/datagen/test_pipeline.py and test_resume.py.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel

from tw_recipes.datagen.annotator import Annotator
from tw_recipes.datagen.blocks import propose_blocks
from tw_recipes.datagen.filter import check_input, finish, sequential
from tw_recipes.datagen.limits import BudgetExhaustedError
from tw_recipes.datagen.llm import AccessError, EndpointError
from tw_recipes.datagen.models import Blocks, Dropped, Outlined, Rewritten, Sample, Steps, Trace
from tw_recipes.datagen.outlines import write_outlines
from tw_recipes.datagen.reasons import Reason, Rejected
from tw_recipes.datagen.rewrite import rewrite_threads
from tw_recipes.datagen.steps import extract_steps
from tw_recipes.datagen.store import Shard, Store, failed_sample
from tw_recipes.evaluation.grading import Grader

_Output = TypeVar("_Output", bound=BaseModel)


@dataclass
class RunSummary:
    """What a run did.

    Attributes:
        kinds: Records of this run by the kind they ended as.
        skipped: Records that earlier runs had finished.
        stopped: Why the run ended early, "" if it did not.
        seconds: Wall-clock time.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    stopped: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Records that failed in this run."""
        return self.kinds["failed"]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items())) or "none"
        done = sum(self.kinds.values())
        rate = done / self.seconds if self.seconds else 0.0
        return f"{done} records in {self.seconds:.1f} s ({rate:,.1f}/s): {kinds}; {self.skipped} were done before"


async def annotate(trace: Trace, annotator: Annotator, grader: Grader) -> Sample:
    """Run one trace through all stages, without a store.

    Raises:
        EndpointError: No reply came; AccessError and BudgetExhaustedError likewise.
    """
    return await _stages(trace, annotator, grader, None)


async def run_pipeline(
    traces: Iterable[Trace | Sample],
    annotator: Annotator,
    grader: Grader,
    store: Store,
    *,
    concurrency: int = 64,
    worker: int = 0,
    workers: int = 1,
    on_progress: Callable[[RunSummary], None] | None = None,
) -> RunSummary:
    """Run traces through all stages into the store; call it again to go on after a kill or a failure.

    Args:
        traces: Read as fast as records finish; rejected samples pass through.
        annotator: Who is asked; closed at the end.
        grader: Grades input and output.
        store: Keeps what stages give.
        concurrency: The most records in flight.
        worker: Number of this worker; it takes the shards with number % workers == worker.
        workers: How many there are.
        on_progress: Called after every record.

    Returns:
        Counts of this run.

    Raises:
        AccessError: The endpoint refuses every call.
        ValueError: `concurrency` or `worker` is out of range.
    """
    if concurrency < 1 or not 0 <= worker < workers:
        raise ValueError(f"concurrency must be >= 1 and 0 <= worker < workers, got {concurrency}, {worker}, {workers}")
    job = _Job(annotator, grader, store, on_progress)
    began = time.perf_counter()
    try:
        await job.run(traces, concurrency, worker, workers)
    finally:
        await annotator.aclose()
        job.summary.seconds = time.perf_counter() - began
    return job.summary


class _Job:
    def __init__(
        self, annotator: Annotator, grader: Grader, store: Store, on_progress: Callable[[RunSummary], None] | None
    ) -> None:
        self.annotator, self.grader, self.store, self.on_progress = annotator, grader, store, on_progress
        self.summary = RunSummary()
        self.error: BaseException | None = None

    async def run(self, traces: Iterable[Trace | Sample], concurrency: int, worker: int, workers: int) -> None:
        free = asyncio.Semaphore(concurrency)
        tasks: set[asyncio.Task[None]] = set()
        shard: Shard | None = None
        skip = -1  # number of a shard that is not ours or is finished
        try:
            for record in traces:
                number = record.place // self.store.shard_size
                if number == skip:
                    self.summary.skipped += number % workers == worker
                    continue
                if shard is None or shard.number != number:
                    if shard is not None:
                        self._release(shard)
                        shard = None
                    if number % workers != worker or self.store.finished(number):
                        skip = number
                        self.summary.skipped += number % workers == worker
                        continue
                    shard = self.store.open(number)
                    shard.pending += 1  # held while records are admitted
                shard.records += 1
                if shard.has("filter", record.place):
                    self.summary.skipped += 1
                    continue
                await free.acquire()
                if self.error is not None:
                    free.release()
                    break
                shard.pending += 1
                task = asyncio.create_task(self._record(record, shard))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(lambda _: free.release())
            if shard is not None:
                # Where the run was stopped, records of this shard were not even begun.
                self._release(shard, complete=self.error is None)
            while tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(self.error, BudgetExhaustedError):
            self.summary.stopped = str(self.error)
        elif self.error is not None:
            raise self.error

    def _release(self, shard: Shard, *, complete: bool = True) -> None:
        shard.pending -= 1
        shard.cut = shard.cut or not complete
        if not shard.pending:
            shard.close(complete=not shard.cut)

    async def _record(self, record: Trace | Sample, shard: Shard) -> None:
        complete = False
        try:
            sample = record if isinstance(record, Sample) else await self._sample(record, shard)
            if sample.kind == "failed":
                shard.failed += 1
            shard.put("failed" if sample.kind == "failed" else "filter", sample.place, sample)
            self.summary.kinds[sample.kind] += 1
            complete = True
            if self.on_progress is not None:
                self.on_progress(self.summary)
        except Exception as error:
            self.error = self.error or error
        finally:
            self._release(shard, complete=complete)

    async def _sample(self, trace: Trace, shard: Shard) -> Sample:
        try:
            return await _stages(trace, self.annotator, self.grader, shard)
        except (AccessError, BudgetExhaustedError, OSError):
            raise  # these end the run
        except EndpointError as error:
            dropped = Dropped(reason=Reason.ENDPOINT, detail=self.annotator.redacted(str(error))[:300])
        except Exception as error:
            text = self.annotator.redacted(f"{type(error).__name__}: {error}")
            dropped = Dropped(reason=Reason.INTERNAL, detail=text[:300])
        return failed_sample(trace.place, trace.id, dropped)


async def _stages(trace: Trace, annotator: Annotator, grader: Grader, shard: Shard | None) -> Sample:
    async def stage(name: str, model: type[_Output], work: Callable[[], Awaitable[_Output]]) -> _Output:
        found = shard.take(name, trace.place, model) if shard is not None else None
        if found is None:
            found = await work()
            if shard is not None:
                shard.put(name, trace.place, found)
        return found

    try:
        await check_input(trace, grader, annotator.options)
    except Rejected as problem:
        dropped = Dropped(reason=problem.reason, detail=problem.detail)
        return Sample(place=trace.place, id=trace.id, kind="rejected", dropped=[dropped])
    if trace.reasoning.count("\n") + 1 < annotator.options.min_lines:
        detail = f"{trace.reasoning.count(chr(10)) + 1} lines, min_lines={annotator.options.min_lines}"
        return sequential(trace, [Dropped(reason=Reason.INPUT_SHORT, detail=detail)])
    try:
        steps = await stage("steps", Steps, lambda: extract_steps(trace, annotator))
        blocks = await stage("blocks", Blocks, lambda: propose_blocks(trace, steps, annotator))
    except Rejected as problem:
        return sequential(trace, [Dropped(reason=problem.reason, detail=problem.detail)])
    rewritten = await stage("rewrite", Rewritten, lambda: rewrite_threads(trace, blocks, annotator))
    outlined = await stage("outlines", Outlined, lambda: write_outlines(trace, rewritten, annotator))
    sample = await finish(trace, outlined, grader, annotator.options)
    dropped = [*blocks.dropped, *rewritten.dropped, *sample.dropped]
    if sample.kind == "sequential" and not dropped:
        dropped = [Dropped(reason=Reason.NO_BLOCKS, detail="no block was proposed")]
    return sample.model_copy(update={"dropped": dropped, "repairs": blocks.repairs})
