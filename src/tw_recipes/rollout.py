"""Decodes a stream of prompts into a JSONL file of trajectories that a kill cannot spoil.

    prompts (id, ids) × samples ──ForkJoinDecoder──► one line each, appended and flushed as it finishes

A line is a data set row that `threadweaver sft` reads ("units"), with text, measures, timings and status. Keys that
the file already has are skipped, those of lost trajectories (an engine that failed) are decoded again, a half-written
last line is cut off first, and a file made with other settings is refused. Prompts in flight are bounded; results are
never held.
Guarded by tests/recipes/test_rollout.py. `threadweaver rollout` is tw_recipes.rollout_command.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from tw_core import check_ids
from tw_core.errors import ThreadWeaverError
from tw_recipes.blocking import run_blocking
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.decoding.rollout import LOST, Call, Rollout
from tw_recipes.decoding.rollout import Path as Path_

THINK = "<think>\n"
"""What opens the reasoning, where a response starts inside it."""


class RolloutFileError(ThreadWeaverError, ValueError):
    """A file of trajectories belongs to another run, or is broken before its last line."""


class Prompt(NamedTuple):
    """One prompt: a unique name, its token ids, and columns that are copied into its lines."""

    id: str
    ids: Any
    extra: Mapping[str, Any] = {}


@dataclass
class RolloutSummary:
    """What a run did.

    Attributes:
        path: The file.
        written: Lines of this run.
        skipped: Trajectories that the file already had.
        again: Lost trajectories of earlier runs, whose lines were taken out of the file.
        statuses: How many lines of this run have each status.
        tokens: Tokens that the engine generated in this run.
        seconds: Wall-clock time of this run.
    """

    path: Path
    written: int = 0
    skipped: int = 0
    again: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Trajectories that ended in an error or were cancelled."""
        return sum(self.statuses.get(status, 0) for status in LOST)

    def __str__(self) -> str:
        states = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items())) or "none"
        rate = self.tokens / self.seconds if self.seconds else 0.0
        again = f", {self.again} had failed before" if self.again else ""
        return (
            f"{self.written} trajectories written to {self.path} ({states}), {self.skipped} were there{again}; "
            f"{self.tokens:,} tokens in {self.seconds:.1f} s ({rate:,.0f} tokens/s)"
        )


def rollout(
    prompts: Iterable[Prompt],
    decoder: ForkJoinDecoder,
    tokenizer: Any,
    path: str | Path,
    *,
    samples: int = 1,
    concurrency: int = 256,
    settings: Mapping[str, Any] | None = None,
    units: bool = True,
    total: int | None = None,
    progress: bool = False,
) -> RolloutSummary:
    """Decodes prompts and appends their trajectories to a JSONL file; call it again to go on after a kill or a failure.

    Args:
        prompts: Read lazily; ids must be unique.
        decoder: Engine, limits and sampling. Its engine is closed at the end.
        tokenizer: For the text column.
        path: The .jsonl file. Beside it, `<path>.settings.json` keeps `settings`.
        samples: Trajectories per prompt; their keys are "<id>#<k>".
        concurrency: The most trajectories in flight.
        settings: What the trajectories depend on; going on with other settings is refused. None checks nothing.
        units: Whether lines hold the units (contexts repeat the prefix, so lines are long); without them the joined
            ids and `prompt_length` give them back by `extract_units`, unless a closer was forced.
        total: Number of prompts, for the estimate of the time left.
        progress: Whether to show a progress bar on stderr.
    Returns:
        Counts of this run. A trajectory that failed is a line with its status and reason, until a later run redoes it.
    Raises:
        RolloutFileError: The file is of another run, or broken.
        ValueError: A prompt's id repeats, or `samples` or `concurrency` is not positive.
    """
    if samples < 1 or concurrency < 1:
        raise ValueError(f"samples and concurrency must be >= 1, got {samples} and {concurrency}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    done, lost = finished_keys(path)
    _check_settings(path, settings)
    summary = RolloutSummary(path, again=_without(path, lost))
    job = _Job(decoder, tokenizer, summary, done, samples, units)
    bar: AbstractContextManager[Any] = _Bar(None if total is None else total * samples) if progress else nullcontext()
    began = time.perf_counter()
    with path.open("a", encoding="utf-8") as out, bar as shown:
        run_blocking(job.run(prompts, out, concurrency, shown))
    summary.seconds = time.perf_counter() - began
    return summary


def finished_keys(path: str | Path) -> tuple[set[str], set[str]]:
    """Keys of the whole lines of a file of trajectories; a last line that lacks its end is cut off.

    Returns:
        Keys of trajectories that are done, and of those that were lost (`LOST`).

    Raises:
        RolloutFileError: A line is no trajectory, or a key stands twice.
    """
    path, done, lost, good = Path(path), set[str](), set[str](), 0
    if not path.exists():
        return done, lost
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                key, status = row["key"], row["status"]
                if not (isinstance(key, str) and line.endswith(b"\n")):
                    raise ValueError("half a line, or a key that is no name")
            except (ValueError, KeyError, TypeError) as error:
                # A killed run leaves the beginning of a line; whatever else stands here is not ours to cut off.
                if line.endswith(b"\n") or not (done or lost or settings_file(path).exists()):
                    raise RolloutFileError(
                        f"{path}, line {number}: expected a trajectory with a key and a status, got {line[:60]!r}; "
                        "repair the file, or name another one to write"
                    ) from error
                break
            if key in done or key in lost:
                raise RolloutFileError(f"{path}, line {number}: key {key!r} stands twice; two runs wrote this file")
            (lost if status in LOST else done).add(key)
            good += len(line)
    if good != path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(good)
    return done, lost


def read_trajectories(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of trajectories, one at a time.

    Raises:
        FileNotFoundError: There is no such file.
        RolloutFileError: A line is no trajectory.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; write it with `threadweaver rollout`")
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["key"], row["stats"], row["status"], row["token_latency"]
            except (ValueError, KeyError, TypeError) as error:
                raise RolloutFileError(
                    f"{path}, line {number}: expected a line of `threadweaver rollout`, got {line[:60]!r}; "
                    "repair the file or run the rollout again"
                ) from error
            yield row


def trajectory_row(rollout: Rollout, tokenizer: Any, *, units: bool = True) -> dict[str, Any]:
    """One trajectory as a JSON object: ids, units, text, measures, format problems, status and the calls' timings."""
    report = check_ids(rollout.ids, rollout.tag_ids, prompt_length=rollout.prompt_length, numbering="any")
    logprobs = rollout.logprobs
    row: dict[str, Any] = {
        "key": rollout.key,
        "status": rollout.status,
        "reason": rollout.reason,
        "text": rollout.text(tokenizer),
        "stats": rollout.stats._asdict(),
        **_executed(rollout),
        "format_ok": report.ok and not rollout.forced,
        "problems": [[problem.offset, problem.kind, problem.message] for problem in report.problems],
        "forced": rollout.forced,
        "limits_hit": dict(rollout.limits_hit),
        "generated_tokens": rollout.generated_tokens,
        "cached_share": rollout.cached_share,
        "seconds": rollout.seconds,
        "calls": [_call(call) for call in rollout.calls],
        "prompt_length": rollout.prompt_length,
        "ids": rollout.ids.tolist(),
    }
    if units:
        row["units"] = [[unit.context.tolist(), unit.completion.tolist()] for unit in rollout.units]
        row["logprobs"] = None if logprobs is None else [values.tolist() for values in logprobs]
    return row


def _executed(rollout: Rollout) -> dict[str, int]:
    """Blocks and threads that ran at once, and the token latency of that.

    A block that the model wrote in one call (a sequential run, a limit) is text: its tags earn nothing. When every
    block was run, the latency is L of SPEC section 5; otherwise the longest chain of calls plus all injected glue.
    """
    stats, tokens = rollout.stats, defaultdict[Path_, int](int)
    for call in rollout.calls:
        if call.kind != "warm":
            tokens[call.path] += len(call.completion)
    blocks: dict[tuple[Path_, int], list[Path_]] = {}
    for path in tokens:
        if path:
            blocks.setdefault((path[:-1], path[-1][0]), []).append(path)
    latency = stats.critical_path_tokens
    if len(blocks) != stats.num_blocks:
        chain = dict(tokens)
        for (parent, _), threads in sorted(blocks.items(), key=lambda block: -len(block[0][0])):  # deepest first
            chain[parent] = chain.get(parent, 0) + max(chain[thread] for thread in threads)
        latency = stats.total_tokens - rollout.generated_tokens + chain.get((), 0)
    return {"forks": len(blocks), "forked_threads": sum(map(len, blocks.values())), "token_latency": latency}


def _call(call: Call) -> dict[str, Any]:
    found = {
        "kind": call.kind,
        "path": [list(step) for step in call.path],
        "finish": call.finish,
        "context_tokens": len(call.context),
        "tokens": len(call.completion),
        "queued": round(call.queued, 6),
        "started": round(call.started, 6),
        "ended": round(call.ended, 6),
    }
    optional = {"cached_tokens": call.cached_tokens, "replica": call.replica, "error": call.error}
    if call.attempts > 1:
        optional["attempts"] = call.attempts
    return found | {name: value for name, value in optional.items() if value not in (None, "")}


def _without(path: Path, lost: set[str]) -> int:
    """Takes the lines with these keys out of the file; a kill leaves it as it was. Returns how many."""
    if lost:
        half = path.with_name(path.name + ".part")
        with path.open("rb") as old, half.open("wb") as new:
            new.writelines(line for line in old if json.loads(line)["key"] not in lost)
        half.replace(path)
    return len(lost)


def settings_file(path: Path) -> Path:
    """Where the settings of a file of trajectories are kept."""
    return path.with_name(path.name + ".settings.json")


def _check_settings(path: Path, settings: Mapping[str, Any] | None) -> None:
    """Keeps settings beside a new file; compares them for one that is gone on with."""
    if settings is None:
        return
    kept, wanted = settings_file(path), json.loads(json.dumps(settings))
    if path.exists() and path.stat().st_size and kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
        if changed:
            name = changed[0]
            raise RolloutFileError(
                f"{path} was made with {name}={before.get(name)!r}, got {wanted.get(name)!r}"
                f"{f' (and {len(changed) - 1} more changes)' if changed[1:] else ''}; "
                "give the same settings to go on, or another output file"
            )
    kept.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


class _Job:
    """One run: which trajectories are wanted, and writing those that finish."""

    def __init__(
        self,
        decoder: ForkJoinDecoder,
        tokenizer: Any,
        summary: RolloutSummary,
        done: set[str],
        samples: int,
        units: bool,
    ) -> None:
        self.decoder, self.tokenizer, self.summary = decoder, tokenizer, summary
        self.done, self.samples, self.units = done, samples, units
        self.pending: dict[int, tuple[str, int, Mapping[str, Any]]] = {}
        self.next_key = ""

    async def run(self, prompts: Iterable[Prompt], out: IO[str], concurrency: int, bar: Any) -> None:
        try:
            found = self.decoder.stream(self._wanted(prompts), self._keys(), max_trajectories=concurrency)
            async for place, result in found:
                self._write(place, result, out)
                if bar is not None:
                    bar.update(self.summary)
        finally:
            await self.decoder.engine.aclose()

    def _wanted(self, prompts: Iterable[Prompt]) -> Iterator[Any]:
        seen: set[str] = set()
        place = 0
        for prompt in prompts:
            if prompt.id in seen:
                raise ValueError(f"prompt id {prompt.id!r} stands twice; make the ids unique")
            seen.add(prompt.id)
            for sample in range(self.samples):
                key = f"{prompt.id}#{sample}"
                if key in self.done:
                    self.summary.skipped += 1
                    continue
                self.pending[place] = (prompt.id, sample, prompt.extra)
                self.next_key = key
                place += 1
                yield prompt.ids

    def _keys(self) -> Iterator[str]:
        """The key of the prompt that `_wanted` gave last: the decoder asks for both in turn."""
        while True:
            yield self.next_key

    def _write(self, place: int, result: Rollout, out: IO[str]) -> None:
        name, sample, extra = self.pending.pop(place)
        row = {"id": name, "sample": sample} | trajectory_row(result, self.tokenizer, units=self.units)
        out.write(json.dumps({**extra, **row}, ensure_ascii=False) + "\n")
        out.flush()
        summary = self.summary
        summary.written += 1
        summary.tokens += result.generated_tokens
        summary.statuses[result.status] = summary.statuses.get(result.status, 0) + 1


class _Bar:
    """A rich progress bar on stderr: trajectories, tokens/s, time left."""

    def __init__(self, total: int | None):
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("rollout"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task("rollout", total=total, rate=0.0)
        self.began = time.perf_counter()

    def __enter__(self) -> "_Bar":
        self.bar.start()
        return self

    def update(self, summary: RolloutSummary) -> None:
        """Show the counts so far."""
        rate = summary.tokens / (time.perf_counter() - self.began)
        self.bar.update(self.task, completed=summary.written + summary.skipped, rate=rate)

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
