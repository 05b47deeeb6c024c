"""The data set: shares, formats, files, and that every reader of the project takes it."""

from collections import Counter
from pathlib import Path

import pytest
from pyarrow import parquet

from tw_recipes.datagen.mix import Mix, MixOptions, count_rows, read_dataset, write_dataset
from tw_recipes.datagen.reasons import DatagenError
from tw_recipes.sft.command import load_split
from tw_recipes.sft.rows import row_format


def records(forked: int, plain: int, rejected: int = 0) -> list[dict]:
    kinds = ["forkjoin"] * forked + ["sequential"] * plain + ["rejected"] * rejected
    return [
        {
            "place": place,
            "id": f"r{place}",
            "kind": kind,
            "prompt": f"q{place}",
            "text": f"{kind} {place}",
            "sequential": f"plain {place}",
            "answer": "1",
            "acceleration": 0.3 if kind == "forkjoin" else 0.0,
            "threads": [2, 3] if kind == "forkjoin" else [],
        }
        for place, kind in enumerate(kinds)
    ]


def written(folder: Path, made: list[dict], **options) -> tuple[Mix, list[dict]]:
    options = MixOptions(**{"format": "text"} | options)
    mix = write_dataset(lambda: iter(made), folder, options)
    return mix, list(read_dataset(folder, options.format))


@pytest.mark.parametrize(
    ("forked", "plain", "share", "mix"),
    [
        (90, 100, 0.1, Mix(90, 10, 0, 90)),
        (90, 4, 0.1, Mix(85, 9, 5, 0)),
        (100, 0, 0.1, Mix(90, 10, 10, 0)),
        (50, 50, 0.5, Mix(50, 50, 0, 0)),
        (100, 20, 0.0, Mix(100, 0, 0, 20)),
    ],
)
def test_the_chosen_share_is_sequential(tmp_path, forked, plain, share, mix):
    found, rows = written(tmp_path / "data", records(forked, plain, 3), sequential_share=share)
    assert found == mix
    assert Counter(row["kind"] for row in rows) == Counter(forkjoin=mix.forkjoin, sequential=mix.sequential)
    assert count_rows(tmp_path / "data") == mix.forkjoin + mix.sequential
    for row in rows:
        plain_text = row["kind"] == "sequential"
        assert row["text"].startswith("plain" if plain_text else "forkjoin")
        assert (row["blocks"], row["threads"], row["acceleration"]) == ((0, 0, 0.0) if plain_text else (2, 5, 0.3))
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=lambda name: int(name[1:]))


def test_the_choice_depends_on_the_seed_alone(tmp_path):
    made = records(100, 50)
    first = written(tmp_path / "a", made)[1]
    assert written(tmp_path / "b", made)[1] == first
    other = written(tmp_path / "c", made, seed=1)[1]
    assert other != first
    assert len(other) == len(first)


def test_files_of_both_formats_are_read_by_sft(tmp_path):
    for form in ("text", "messages"):
        folder = tmp_path / form
        mix, _ = written(folder, records(30, 5), format=form, rows_per_file=10)
        rows = mix.forkjoin + mix.sequential
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"train-{n:05d}-of-{len(names):05d}.parquet" for n in range(-(-rows // 10))]
        loaded = load_split(str(folder), "train")
        assert len(loaded) == rows
        assert row_format(loaded.column_names) == form
        if form == "messages":
            assert [turn["role"] for turn in loaded[0]["messages"]] == ["user", "assistant"]
    with pytest.raises(DatagenError, match=r"must have the columns of format='text' \(prompt, text, id"):
        list(read_dataset(tmp_path / "messages", "text"))
    with pytest.raises(FileNotFoundError, match="holds no train-"):
        list(read_dataset(tmp_path, "text"))


def test_a_new_data_set_replaces_the_old_one_when_it_is_whole(tmp_path):
    written(tmp_path / "data", records(30, 0), rows_per_file=10)
    written(tmp_path / "data", records(5, 0), sequential_share=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert parquet.read_metadata(next((tmp_path / "data").iterdir())).num_rows == 5
    with pytest.raises(DatagenError, match="no record became a fork/join sample"):
        written(tmp_path / "data", records(0, 5))
    assert count_rows(tmp_path / "data") == 5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sequential_share": 1.0}, r"sequential_share must be in \[0, 1\), got 1.0"),
        ({"format": "csv"}, 'format must be "text" or "messages"'),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        MixOptions(**options)
