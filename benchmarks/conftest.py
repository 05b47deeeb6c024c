"""What pytest-benchmark files share: the machine in the report, one core, figures that become a results file."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.records import device_name, write_records


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out benchmarks with a command line of their own (`python -m benchmarks.<name>`)."""
    script = collection_path.suffix == ".py" and '__name__ == "__main__"' in collection_path.read_text()
    return True if script else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds GPU, torch and triton to the report of pytest-benchmark."""
    gpu = {"gpu": device_name("cuda"), "cuda": torch.version.cuda} if torch.cuda.is_available() else {"gpu": None}
    machine_info |= {**gpu, "torch": torch.__version__, "triton": version("triton")}


@pytest.fixture
def one_core() -> Iterator[None]:
    """Torch on one thread, as the published figures say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Records of one module; written to its results file when all of the module ran and passed."""
    records: list[dict[str, Any]] = []
    yield records
    config, module = request.config, request.path
    whole = not config.getoption("keyword") and not any("::" in argument for argument in config.args)
    if whole and not request.session.testsfailed:
        command = f"pytest {module.relative_to(config.rootpath)}"
        write_records(module.stem.removeprefix("bench_"), records, command=command, seed=0, device="cpu")
