"""Stage 1 of data generation with an annotator that costs no time, and what its data set trains.

    python -m benchmarks.bench_datagen                     10,000 traces -> benchmarks/results/datagen-cpu.json
    python -m benchmarks.bench_datagen --train             also trains the quickstart's model on both data sets
    python -m benchmarks.bench_datagen --count 200 --out DIR      small, its test

Throughput: `generate_data` with the rule-based annotator of the tests, in this process, on the sum-of-products task:
reading, five questions a record, every check, the trace of all calls, the store, data set and report. Once in one
process, once in two that share the job (a process a core). Records per second count everything but starting Python;
memory is the resident set after each tenth of the records, so that growth shows.

Training: the quickstart's common start, then its second stage once on the task's own fork/join solutions and once on
the generated data set with its sequential share; both decode the same held-out problems.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from benchmarks.records import write_records
from tests.support.annotator import RuleAnnotator
from tests.support.traces import trace_file

from tw_recipes.datagen.generate import EndpointOptions, JobOptions, JobResult, generate_data
from tw_recipes.datagen.mix import MixOptions, read_dataset

SEED = 0


def job(source: Path, out: Path, count: int, worker: int = 0, workers: int = 1) -> JobOptions:
    """The job that is timed: ten shards, a tenth of the data set sequential."""
    shape: dict[str, Any] = {"shard_size": -(-count // 10), "worker": worker, "workers": workers}
    return JobOptions(str(source), out, EndpointOptions("rule"), mix=MixOptions(0.1, "text"), grader="exact", **shape)


def run_job(options: JobOptions, count: int) -> tuple[JobResult, list[float]]:
    """Run a job; also the resident memory in MiB after each tenth of the records."""
    process, seen = psutil.Process(), []

    def watch(summary: Any, usage: Any) -> None:
        done = sum(summary.kinds.values())
        if done * 10 // count > len(seen):
            seen.append(process.memory_info().rss / 2**20)

    return generate_data(options, llm=RuleAnnotator(), on_progress=watch), seen


def _worker(options: JobOptions, count: int, ready: Any, go: Any, found: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    ready.release()
    go.wait()
    _, memory = run_job(options, count)
    found.put(memory)


def throughput(count: int, folder: Path) -> list[dict[str, Any]]:
    """Records of the job in one process and in two."""
    source = trace_file(folder / "traces.jsonl", count, seed=SEED)
    records = []

    def add(case: str, metric: str, value: float, unit: str) -> None:
        records.append({"case": case, "impl": "generate_data", "metric": metric, "value": value, "unit": unit})

    began, cpu = time.perf_counter(), time.process_time()
    result, memory = run_job(job(source, folder / "one", count), count)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    add("one_process", "records_per_s", count / seconds, "records/s")
    add("one_process", "records_per_cpu_s", count / cpu, "records/s")
    add("one_process", "rss_first_tenth_mib", memory[0], "MiB")
    add("one_process", "rss_last_tenth_mib", memory[-1], "MiB")
    add("one_process", "forkjoin_share", result.findings.kinds["forkjoin"] / count, "share")

    context = multiprocessing.get_context("spawn")
    ready, go, found = context.Semaphore(0), context.Event(), context.Queue()
    workers = [
        context.Process(target=_worker, args=(job(source, folder / "two", count, n, 2), count // 2, ready, go, found))
        for n in range(2)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    began = time.perf_counter()
    go.set()
    memories = [found.get() for _ in workers]
    final, _ = run_job(job(source, folder / "two", count), count)  # writes data set and report
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
    if list(read_dataset(folder / "one" / "dataset", "text")) != list(read_dataset(folder / "two" / "dataset", "text")):
        raise AssertionError("one process and two must write the same data set")
    assert final.run.skipped == count
    add("two_processes", "records_per_s", count / seconds, "records/s")
    add("two_processes", "rss_first_tenth_mib", max(memory[0] for memory in memories), "MiB")
    add("two_processes", "rss_last_tenth_mib", max(memory[-1] for memory in memories), "MiB")
    return records


def training(steps: int, problems: int, folder: Path) -> list[dict[str, Any]]:
    """Accuracy of the quickstart's model, trained on the task's own solutions and on the generated data set."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from tw_recipes.pipelines.comparison import measure
    from tw_recipes.pipelines.quickstart import SECOND_LR, START_SHARE
    from tw_recipes.pipelines.training import BATCH, train
    from tw_recipes.tasks import get_task
    from tw_recipes.tasks.model import tiny_model

    torch.set_num_threads(min(torch.get_num_threads(), 2))
    set_seed(SEED)
    task = get_task("products")
    tokenizer = task.tokenizer()
    first = round(steps * START_SHARE)
    total = (steps - first) * BATCH

    source = trace_file(folder / "train.jsonl", total, seed=SEED, offset=first * BATCH)
    generate_data(job(source, folder / "job", total), llm=RuleAnnotator())
    generated = list(read_dataset(folder / "job" / "dataset", "text"))
    own = task.rows(total, seed=SEED, style="forkjoin", offset=first * BATCH)

    start = tiny_model(tokenizer, seed=SEED)
    rows = task.rows(first * BATCH, seed=SEED, style="sequential")
    train(start, tokenizer, rows, tries=False, folder=folder / "trainer", seed=SEED)
    start.save_pretrained(folder / "start")

    test = task.rows(problems, seed=SEED, split="test")
    longest = max(len(tokenizer.encode(row["text"])) for row in test[:8])
    records = []
    for name, data in (("own_solutions", own), ("generated", generated)):
        model = AutoModelForCausalLM.from_pretrained(folder / "start")
        whole = data[: len(data) // BATCH * BATCH]
        train(model, tokenizer, whole, tries=True, folder=folder / "trainer", seed=SEED, lr_scale=SECOND_LR)
        budgets = {"max_total_tokens": longest + 32, "max_thread_tokens": longest // 3}
        found = measure(model, tokenizer, test, task.grader(), fork=True, single=1, **budgets)
        for metric, value, unit in (
            ("accuracy", found.correct.mean(), "share"),
            ("format_correct", found.well_formed.mean(), "share"),
            ("token_latency", found.critical_path.mean(), "tokens"),
            ("rows", len(whole), "rows"),
            ("sequential_rows", sum(row.get("kind") == "sequential" for row in whole), "rows"),
        ):
            records.append(
                {"case": "quickstart_model", "impl": name, "metric": metric, "value": float(value), "unit": unit}
            )
    return records


def main() -> int:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="traces")
    parser.add_argument("--train", action="store_true", help="also train and decode")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of each model")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results file; default: the repository's")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="datagen-"))
    name = "datagen" if args.out is None else args.out / "datagen-cpu.json"
    command = f"python -m benchmarks.bench_datagen --count {args.count}"
    try:
        records = throughput(args.count, folder)
        path = write_records(name, records, command=command, seed=SEED, device="cpu")
        if args.train:
            (folder / "train").mkdir()
            records += training(args.steps, args.problems, folder / "train")
            command += f" --train --steps {args.steps} --problems {args.problems}"
            path = write_records(name, records, command=command, seed=SEED, device="cpu")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for record in records:
        print(
            f"{record['case']:<18}{record['impl']:<16}{record['metric']:<22}{record['value']:>12.2f} {record['unit']}"
        )
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
