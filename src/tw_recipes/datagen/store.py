"""What a job has done so far, on disk: one JSON line a record and stage, in shards.

    OUT/settings.json                      what the job depends on; going on with other settings is refused
    OUT/stages/<stage>/shard-00012.jsonl   {"place", "data"} each; stages steps, blocks, rewrite, outlines, filter
    OUT/stages/failed/shard-00012.jsonl    records that failed, for reading
    OUT/stages/done/shard-00012.json       the shard is finished: {"records", "failed"}

A shard holds the records place // shard_size == its number; machines take shards by number. Lines are appended as
stages finish, in any order; a kill can only leave a half-written last line, which is cut off when the shard is opened
again. Only open shards are in memory.
Guarded by tests/recipes/datagen/test_pipeline.py and test_resume.py.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel

from tw_recipes.datagen.models import Sample
from tw_recipes.datagen.reasons import DatagenError

STAGES = ("steps", "blocks", "rewrite", "outlines", "filter")
_Output = TypeVar("_Output", bound=BaseModel)


class StoreError(DatagenError, ValueError):
    """The folder belongs to another job, or a file in it is broken."""


class Store:
    """The stage files of one job.

    Args:
        folder: The job's folder; made where it is missing.
        settings: What its records depend on.
        shard_size: Records a shard.
    Raises:
        StoreError: The folder was made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], shard_size: int = 1000) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self.folder, self.shard_size = folder, shard_size
        for stage in (*STAGES, "failed", "done"):
            (folder / "stages" / stage).mkdir(parents=True, exist_ok=True)
        self._check(json.loads(json.dumps({**settings, "shard_size": shard_size})))

    def _check(self, wanted: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
            if changed:
                raise StoreError(
                    f"{self.folder} was made with {changed[0]}={before.get(changed[0])!r}, got "
                    f"{wanted.get(changed[0])!r}; give the same settings to go on, or another folder"
                )
        else:
            _write(path, json.dumps(wanted, indent=1) + "\n")

    def path(self, stage: str, shard: int) -> Path:
        """The file of a stage and shard."""
        suffix = "json" if stage == "done" else "jsonl"
        return self.folder / "stages" / stage / f"shard-{shard:05d}.{suffix}"

    def finished(self, shard: int) -> bool:
        """Whether every record of a shard has come to its end, none of them by a failure."""
        path = self.path("done", shard)
        return path.exists() and json.loads(path.read_text(encoding="utf-8"))["failed"] == 0

    def open(self, shard: int) -> "Shard":
        """Read what a shard has and go on with it."""
        self.path("done", shard).unlink(missing_ok=True)
        return Shard(self, shard)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Every finished record as a dict of `Sample`, in the order of the input; one shard at a time in memory."""
        for path in sorted((self.folder / "stages" / "filter").glob("*.jsonl")):
            found = {line["place"]: line["data"] for line in _lines(path)}
            for place in sorted(found):
                yield found[place]

    def failures(self) -> Iterator[dict[str, Any]]:
        """Records that have failed and not been finished since, as dicts of `Sample`."""
        for path in sorted((self.folder / "stages" / "failed").glob("*.jsonl")):
            finished = self.folder / "stages" / "filter" / path.name
            done = {line["place"] for line in _lines(finished)} if finished.exists() else set()
            found = {line["place"]: line["data"] for line in _lines(path) if line["place"] not in done}
            yield from (found[place] for place in sorted(found))


class Shard:
    """One shard at work.

    Attributes:
        number: Its number.
        records: Records of the input that belong to it.
        failed: Those that failed in this run.
        pending: Records in flight, and one while records are still admitted.
        cut: Whether a record was left unfinished.
    """

    def __init__(self, store: Store, number: int) -> None:
        self.number, self.store = number, store
        self.records, self.failed, self.pending, self.cut = 0, 0, 0, False
        self._found: dict[str, dict[int, Any]] = {}
        self._files: dict[str, IO[str]] = {}
        for stage in STAGES:
            path = store.path(stage, number)
            if path.exists():
                self._found[stage] = {line["place"]: line["data"] for line in _lines(path, repair=True)}
        store.path("failed", number).unlink(missing_ok=True)  # those are tried again now

    def has(self, stage: str, place: int) -> bool:
        """Whether a record has been through a stage."""
        return place in self._found.get(stage, ())

    def take(self, stage: str, place: int, model: type[_Output]) -> _Output | None:
        """What a stage gave for a record in an earlier run; held no longer."""
        data = self._found.get(stage, {}).pop(place, None)
        return None if data is None else model.model_validate(data)

    def put(self, stage: str, place: int, output: BaseModel) -> None:
        """Append what a stage gave."""
        if stage not in self._files:
            self._files[stage] = self.store.path(stage, self.number).open("a", encoding="utf-8")
        self._files[stage].write(f'{{"place": {place}, "data": {output.model_dump_json()}}}\n')
        self._files[stage].flush()

    def close(self, *, complete: bool) -> None:
        """Close the files; a complete shard is marked."""
        for file in self._files.values():
            file.close()
        if complete:
            mark = {"records": self.records, "failed": self.failed}
            _write(self.store.path("done", self.number), json.dumps(mark) + "\n")


def failed_sample(place: int, name: str, dropped: Any) -> Sample:
    """The end of a record that failed."""
    return Sample(place=place, id=name, kind="failed", dropped=[dropped])


def _lines(path: Path, *, repair: bool = False) -> Iterator[dict[str, Any]]:
    """Whole lines of a stage file; a half-written last line is left out, and cut off with `repair`."""
    good = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                break
            try:
                line = json.loads(data)
                line["place"], line["data"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}, line {number}: expected a record, got {data[:60]!r}; repair it") from error
            good += len(data)
            yield line
    if repair and good != path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(good)


def _write(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one."""
    fresh = path.with_suffix(path.suffix + ".part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
