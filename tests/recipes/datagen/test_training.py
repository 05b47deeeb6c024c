"""What the generated data set trains: as good as the task's own fork/join solutions, within 2 points."""

import pytest
from benchmarks.bench_datagen import throughput, training


def values(records, impl=None):
    return {record["metric"]: record["value"] for record in records if impl in (None, record["impl"])}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstarts_model_learns_as_much_from_the_generated_data_set(tmp_path):
    records = training(1300, 200, tmp_path)
    own, generated = values(records, "own_solutions"), values(records, "generated")
    assert generated["rows"] == own["rows"]
    assert generated["sequential_rows"] > 0
    assert own["accuracy"] >= 0.95
    assert abs(own["accuracy"] - generated["accuracy"]) <= 0.02
    assert generated["format_correct"] >= 0.95


@pytest.mark.slow
def test_one_process_and_two_write_the_same_data_set(tmp_path):
    records = throughput(200, tmp_path)  # raises if they do not
    assert {record["case"] for record in records} == {"one_process", "two_processes"}
