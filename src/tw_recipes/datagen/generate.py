"""Stage 1 as one function: from sequential traces to a data set, a report and the trace of every call.

    OUT/dataset/train-*.parquet   for `threadweaver sft --dataset_name OUT/dataset`
    OUT/report.md, report.json    what was dropped and why, measures, cost; reasons.png, gains.png
    OUT/calls/worker-000.jsonl    every call to the annotator
    OUT/stages/                   what each stage gave, by shard (tw_recipes.datagen.store)

The same call again goes on: finished stages are not asked again, failed records are tried again. Several workers may
share OUT (`worker`, `workers`); a call with workers=1 then writes the data set.
Guarded by tests/recipes/datagen/test_generate.py and test_resume.py.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tw_recipes.blocking import run_blocking
from tw_recipes.data import content_setting
from tw_recipes.datagen.accounting import Accounts, Usage
from tw_recipes.datagen.annotator import Annotator, RetryPolicy
from tw_recipes.datagen.estimate import Estimate, estimate
from tw_recipes.datagen.limits import Budget, RateLimiter
from tw_recipes.datagen.llm import LLM, Models, Price
from tw_recipes.datagen.mix import Mix, MixOptions, write_dataset
from tw_recipes.datagen.models import Sample, Trace
from tw_recipes.datagen.openai_llm import OpenAILLM, Structured
from tw_recipes.datagen.options import StageOptions
from tw_recipes.datagen.pipeline import RunSummary, run_pipeline
from tw_recipes.datagen.prompts import DEFAULT, QUESTIONS, Prompts
from tw_recipes.datagen.reasons import DatagenError
from tw_recipes.datagen.report import Findings, write_report
from tw_recipes.datagen.source import Columns, read_traces
from tw_recipes.datagen.store import Store
from tw_recipes.evaluation.grading import ExactGrader, Grader, GraderPool


@dataclass(frozen=True)
class EndpointOptions:
    """Who annotates, how fast, and for how much.

    Attributes:
        model: Name of the model on the server.
        base_url: OpenAI-compatible endpoint; None: OPENAI_BASE_URL, or OpenAI.
        api_key_env: Environment variable that holds the key; there is no other way to give it.
        models: Other models for single questions (steps, blocks, check, rewrite, outlines).
        prices: Model -> money for a million tokens of prompt and of reply.
        structured: How replies are held to their shape: "json_schema", "json_object", "none", or the first that the
            server takes ("auto").
        temperature: None leaves it to the server.
        timeout_s: Seconds for one call.
        extra: Further fields of the request body, as JSON.
        max_calls: Calls in flight.
        requests_per_minute: None for no limit.
        tokens_per_minute: None for no limit.
        attempts: Calls for one reply, where the server is busy or away.
        max_tokens: Budget of the job, prompt and reply; None for no limit.
        max_cost: Budget of the job in money; None for no limit.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    models: dict[str, str] = field(default_factory=dict)
    prices: dict[str, tuple[float, float]] = field(default_factory=dict)
    structured: Structured = "auto"
    temperature: float | None = None
    timeout_s: float = 600.0
    extra: str = "{}"
    max_calls: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    attempts: int = 6
    max_tokens: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.models) - set(QUESTIONS)):
            raise ValueError(f"models must name questions ({', '.join(QUESTIONS)}), got {', '.join(unknown)}")
        priced = {self.model, *self.models.values()}
        if self.max_cost is not None and not priced <= set(self.prices):
            missing = ", ".join(sorted(priced - set(self.prices)))
            raise ValueError(f"max_cost needs the prices of every model, {missing} has none; set prices")
        if self.attempts < 1 or not self.timeout_s > 0:
            raise ValueError(f"attempts must be >= 1 and timeout_s > 0, got {self.attempts} and {self.timeout_s}")
        try:
            fields = json.loads(self.extra)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f'extra must be a JSON object, got {self.extra!r}; e.g. \'{{"reasoning_effort": "low"}}\'')

    @property
    def annotators(self) -> Models:
        """Names and prices."""
        return Models(self.model, self.models, {name: Price(*price) for name, price in self.prices.items()})

    def llm(self) -> OpenAILLM:
        """The endpoint.

        Raises:
            ValueError: It is OpenAI, and there is no key.
        """
        key = os.environ.get(self.api_key_env)
        if not key and self.base_url is None and not os.environ.get("OPENAI_BASE_URL"):
            raise ValueError(
                f"the environment variable {self.api_key_env} must hold the key of OpenAI, which is asked without "
                "base_url, got none; set it, name another variable (api_key_env), or give the base_url of a server"
            )
        return OpenAILLM(
            self.base_url,
            api_key=key,
            structured=self.structured,
            temperature=self.temperature,
            timeout_s=self.timeout_s,
            extra=json.loads(self.extra),
        )


@dataclass(frozen=True)
class JobOptions:
    """One job of `generate_data`.

    Attributes:
        source: .jsonl or .parquet file, or the name of a Hub data set.
        out: Folder of the job.
        endpoint: Who annotates.
        columns: Where the texts are in the input.
        stages: Thresholds.
        mix: What the data set is made of; may differ when a job is gone on with.
        split: Of a Hub data set.
        limit: Only the first so many rows.
        prompts: Version or folder of the templates.
        grader: "math" is math-verify; "exact" compares the boxed text.
        grade_workers: Grading processes.
        concurrency: Records in flight.
        shard_size: Records of a shard.
        worker: Number of this worker.
        workers: How many work on the job; each takes every so-many-th shard.
    """

    source: Annotated[str, tyro.conf.Positional]
    out: Path
    endpoint: Annotated[EndpointOptions, tyro.conf.arg(name="")]
    columns: Columns = field(default_factory=Columns)
    stages: StageOptions = field(default_factory=StageOptions)
    mix: MixOptions = field(default_factory=MixOptions)
    split: str = "train"
    limit: int | None = None
    prompts: str = DEFAULT
    grader: Literal["math", "exact"] = "math"
    grade_workers: int = 2
    concurrency: int = 64
    shard_size: int = 1000
    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}; leave it out for all rows")

    def settings(self) -> dict[str, Any]:
        """What records depend on: not the place, the speed, the budget or the mix."""
        path = Path(self.source)
        return {
            "source": path.name if path.is_file() else self.source,
            "bytes": path.stat().st_size if path.is_file() else None,
            **content_setting(path, self.out / "settings.json"),
            "columns": asdict(self.columns),
            "split": self.split,
            "limit": self.limit,
            "stages": asdict(self.stages),
            "prompts": Prompts(self.prompts).digest,
            "model": self.endpoint.model,
            "models": self.endpoint.models,
            "temperature": self.endpoint.temperature,
            "extra": self.endpoint.extra,
            "grader": self.grader,
        }

    def traces(self) -> Iterator[Trace | Sample]:
        """The input."""
        return islice(read_traces(self.source, self.columns, split=self.split), self.limit)


@dataclass(frozen=True)
class JobResult:
    """What a job has come to.

    Attributes:
        run: What this call did.
        findings: Counts over the whole job; None for one worker of several.
        mix: What the data set holds; None without one.
        usage: Calls, tokens and money of the whole job, by (question, model), of this worker.
        problem: Why there is no data set, "" otherwise.
    """

    run: RunSummary
    findings: Findings | None
    mix: Mix | None
    usage: dict[tuple[str, str], Usage]
    problem: str = ""


def make_grader(kind: Literal["math", "exact"], workers: int = 2) -> Grader:
    """The grader of a name."""
    return GraderPool(workers) if kind == "math" else ExactGrader()


def dry_run(options: JobOptions) -> Estimate:
    """What a job would ask and cost; nothing is asked or written.

    Raises:
        DatagenError: No row of the input can be read.
    """
    plan = estimate(options.traces(), Prompts(options.prompts), options.endpoint.annotators)
    if not plan.records:
        rows = f"{plan.unreadable} rows and none that can be read" if plan.unreadable else "no row"
        fault = f" ({plan.first_unreadable})" if plan.first_unreadable else ""
        raise DatagenError(
            f"{options.source} must hold traces, got {rows}{fault}; name its columns (columns.question …)"
        )
    return plan


def generate_data(
    options: JobOptions,
    *,
    llm: LLM | None = None,
    on_progress: Callable[[RunSummary, Usage], None] | None = None,
) -> JobResult:
    """Run a job, or go on with it; then write data set and report.

    Args:
        options: The job.
        llm: Answers instead of the endpoint.
        on_progress: Called after every record.

    Returns:
        Counts of this call and of the job. Failed records and an exhausted budget are results, not exceptions.

    Raises:
        StoreError: The folder is of another job.
        AccessError: The endpoint refuses every call.
        ValueError: There is no key for the endpoint.
        FileNotFoundError: There is no input.
    """
    endpoint, models = options.endpoint, options.endpoint.annotators
    llm = llm or endpoint.llm()
    store = Store(options.out, options.settings(), options.shard_size)
    accounts = Accounts(options.out / "calls" / f"worker-{options.worker:03d}.jsonl", models)
    spent = accounts.total
    secret = os.environ.get(endpoint.api_key_env, "")

    async def run(grader: Grader) -> RunSummary:
        annotator = Annotator(
            llm,
            models,
            Prompts(options.prompts),
            options.stages,
            accounts=accounts,
            limiter=RateLimiter(endpoint.requests_per_minute, endpoint.tokens_per_minute),
            budget=Budget(endpoint.max_tokens, endpoint.max_cost, tokens=spent.tokens, cost=spent.cost),
            max_calls=endpoint.max_calls,
            retry=RetryPolicy(endpoint.attempts),
            secrets=(secret,),
        )
        return await run_pipeline(
            options.traces(),
            annotator,
            grader,
            store,
            concurrency=options.concurrency,
            worker=options.worker,
            workers=options.workers,
            on_progress=None if on_progress is None else lambda summary: on_progress(summary, accounts.total),
        )

    grader = make_grader(options.grader, options.grade_workers)
    try:
        summary = run_blocking(run(grader))
    finally:
        grader.close()
    if options.workers > 1:
        return JobResult(summary, None, None, accounts.usage)
    usage = all_usage(options.out / "calls", models)
    mix, problem = None, ""
    try:
        mix = write_dataset(store.samples, options.out / "dataset", options.mix)
    except DatagenError as error:
        problem = str(error)
    records = (record for source in (store.samples(), store.failures()) for record in source)
    findings = write_report(options.out, records, usage, mix, stopped=summary.stopped)
    return JobResult(summary, findings, mix, usage, problem)


def all_usage(folder: Path, models: Models) -> dict[tuple[str, str], Usage]:
    """What all workers of a job have used."""
    total: dict[tuple[str, str], Usage] = {}
    for path in sorted(folder.glob("worker-*.jsonl")):
        accounts = Accounts(path, models)
        accounts.close()
        for key, usage in accounts.usage.items():
            total.setdefault(key, Usage()).add(usage)
    return total


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Records, rate, tokens and cost on stderr."""

    def __init__(self, total: int | None) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("generate-data"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=total, figures="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __call__(self, summary: RunSummary, usage: Usage) -> None:
        """Show the counts so far."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.kinds.items()))
        self._bar.update(
            self._task,
            completed=summary.skipped + sum(summary.kinds.values()),
            figures=f"{kinds}; {usage.tokens:,} tokens, cost {usage.cost:.2f}",
        )

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


def progress_bar(shown: bool, total: int | None = None) -> AbstractContextManager[Any]:
    """A progress bar, or nothing."""
    return ProgressBar(total) if shown else nullcontext()
