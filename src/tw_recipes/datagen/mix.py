"""From finished records to the data set: fork/join samples and a chosen share of sequential ones, as Parquet files.

The sequential share comes from traces in which no block survived: they show when not to fork. Where those are too few,
some fork/join samples are written in their sequential form instead. The choice is by a hash of place and seed, so that
it does not depend on timing, shards or restarts. Records are streamed twice; eight bytes of each are held.
Guarded by tests/recipes/datagen/test_mix.py.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tw_recipes.datagen.reasons import DatagenError

Format = Literal["text", "messages"]

_SHARED = [
    ("id", pa.string()),
    ("answer", pa.string()),
    ("source", pa.string()),
    ("kind", pa.string()),
    ("acceleration", pa.float64()),
    ("blocks", pa.int32()),
    ("threads", pa.int32()),
]
_SCHEMAS: dict[str, pa.Schema] = {
    "text": pa.schema([("prompt", pa.string()), ("text", pa.string()), *_SHARED]),
    "messages": pa.schema(
        [("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))), *_SHARED]
    ),
}
_BATCH = 256


@dataclass(frozen=True)
class MixOptions:
    """What the data set is made of.

    Attributes:
        sequential_share: Share of sequential samples.
        format: "messages" for models with a chat template; "text" has prompt and text as they are.
        rows_per_file: Rows of one Parquet file.
        seed: Of the choice of sequential samples.
    """

    sequential_share: float = 0.1
    format: Format = "messages"
    rows_per_file: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sequential_share < 1:
            raise ValueError(f"sequential_share must be in [0, 1), got {self.sequential_share}")
        if self.format not in _SCHEMAS or self.rows_per_file < 1:
            raise ValueError(
                f'format must be "text" or "messages" and rows_per_file positive, got {self.format!r}, '
                f"{self.rows_per_file}"
            )


@dataclass(frozen=True)
class Mix:
    """What a data set was made of.

    Attributes:
        forkjoin: Fork/join samples.
        sequential: Sequential samples, those made from fork/join ones included.
        turned: Fork/join samples written in their sequential form.
        surplus: Sequential traces that were left out.
    """

    forkjoin: int
    sequential: int
    turned: int
    surplus: int


class _Choice:
    """Which sequential traces stay, and which fork/join samples are turned; by thresholds on a hash."""

    def __init__(self, records: Iterable[Mapping[str, Any]], options: MixOptions) -> None:
        self._seed = options.seed
        plain: list[int] = []
        forked: list[int] = []
        for record in records:
            if record["kind"] in ("forkjoin", "sequential"):
                (forked if record["kind"] == "forkjoin" else plain).append(self._hash(record["place"]))
        share = options.sequential_share
        wanted = int(share / (1 - share) * len(forked) + 1e-9)
        turned = 0 if wanted <= len(plain) else int(share * (len(forked) + len(plain)) + 1e-9) - len(plain)
        kept = min(wanted, len(plain))
        self._plain_below, self._forked_below = _threshold(plain, kept), _threshold(forked, turned)
        self.mix = Mix(len(forked) - turned, kept + turned, turned, len(plain) - kept)

    def sequential(self, record: Mapping[str, Any]) -> bool | None:
        """Whether a record is written in sequential form; None leaves it out."""
        if record["kind"] == "forkjoin":
            return self._hash(record["place"]) < self._forked_below
        if record["kind"] == "sequential" and self._hash(record["place"]) < self._plain_below:
            return True
        return None

    def _hash(self, place: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{place}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def _threshold(hashes: list[int], count: int) -> int:
    """The value below which so many of the hashes lie."""
    if count <= 0:
        return 0
    if count >= len(hashes):
        return 1 << 64
    return int(np.partition(np.array(hashes, dtype=np.uint64), count)[count])


def write_dataset(samples: Callable[[], Iterator[Mapping[str, Any]]], folder: Path, options: MixOptions) -> Mix:
    """Write the data set; a data set that is there is replaced when the new one is whole.

    Args:
        samples: Gives all records, dicts of `Sample`, in order; called twice.
        folder: For train-00000-of-00001.parquet and so on; `datasets.load_dataset(folder)` and `threadweaver sft
            --dataset_name folder` read it.
        options: The mix.

    Returns:
        What it holds.

    Raises:
        DatagenError: There is no fork/join sample.
    """
    choice = _Choice(samples(), options)
    if not choice.mix.forkjoin:
        raise DatagenError("no record became a fork/join sample; the report says why, and so do the stage files")
    rows = (
        row_of(record, sequential, options.format)
        for record in samples()
        if (sequential := choice.sequential(record)) is not None
    )
    total = choice.mix.forkjoin + choice.mix.sequential
    write_parquet(rows, total, folder, options)
    return choice.mix


def write_parquet(rows: Iterator[dict[str, Any]], total: int, folder: Path, options: MixOptions) -> None:
    """Write rows as Parquet files of a data set folder, a batch in memory at a time.

    Args:
        rows: With the columns of the format.
        total: How many there are.
        folder: Replaced when all files are written.
        options: `format` and `rows_per_file`.
    """
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    schema, files = _SCHEMAS[options.format], -(-total // options.rows_per_file)
    for number in range(files):
        left = min(options.rows_per_file, total - number * options.rows_per_file)
        with parquet.ParquetWriter(fresh / f"train-{number:05d}-of-{files:05d}.parquet", schema) as writer:
            while left:
                batch = [row for _, row in zip(range(min(_BATCH, left)), rows, strict=False)]
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                left -= len(batch)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def row_of(record: Mapping[str, Any], sequential: bool, form: Format) -> dict[str, Any]:
    """A record, a dict of `Sample`, as a row of the data set."""
    threads = [] if sequential else record["threads"]
    return dataset_row(
        form,
        prompt=record["prompt"],
        text=record["sequential"] if sequential else record["text"],
        id=record["id"],
        answer=record["answer"],
        source="rewritten",
        kind="sequential" if sequential else "forkjoin",
        acceleration=0.0 if sequential else record["acceleration"],
        blocks=len(threads),
        threads=sum(threads),
    )


def dataset_row(form: Format, *, prompt: str, text: str, **columns: Any) -> dict[str, Any]:
    """A row of the data set in either format.

    Args:
        form: "messages" or "text".
        prompt: The question.
        text: The response.
        columns: id, answer, source, kind, acceleration, blocks and threads.
    """
    if form == "text":
        return {"prompt": prompt, "text": text, **columns}
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return {"messages": turns, **columns}


def read_dataset(folder: Path, form: Format) -> Iterator[dict[str, Any]]:
    """The rows of a data set folder, in order, a batch in memory at a time.

    Raises:
        FileNotFoundError: There is no data set.
        DatagenError: It has another format.
    """
    files = sorted(folder.glob("train-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no train-*.parquet; write it with `threadweaver generate-data`")
    for path in files:
        with parquet.ParquetFile(path) as file:
            if not file.schema_arrow.equals(_SCHEMAS[form]):
                raise DatagenError(
                    f"{path} must have the columns of format={form!r} ({', '.join(_SCHEMAS[form].names)}), got "
                    f"{', '.join(file.schema_arrow.names)}; give both data sets the same format"
                )
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()


def count_rows(folder: Path) -> int:
    """How many rows a data set folder has."""
    return sum(parquet.read_metadata(path).num_rows for path in folder.glob("train-*.parquet"))
