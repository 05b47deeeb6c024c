"""`import tw_core` and `import tw_kernels` stay light, each seen in a fresh process."""

import subprocess
import sys

import pytest

HEAVY = ("triton", "transformers", "trl", "datasets", "accelerate", "peft")


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("package", ["tw_core", "tw_kernels"])
def test_a_cold_import_loads_no_trainer_and_no_compiler(package: str) -> None:
    _run(f"import sys, {package}; loaded = sorted(set({HEAVY!r}) & set(sys.modules)); assert not loaded, loaded")


def test_a_cold_import_of_the_core_needs_torch_and_numpy_alone() -> None:
    """jaxtyping and beartype are tools of development: blocked, the core must import and work."""
    _run(
        "import sys; sys.modules.update(dict.fromkeys(('jaxtyping', 'beartype', 'hypothesis')))\n"
        "import tw_core\n"
        "tags = tw_core.TagIds.from_mapping({tag: i for i, tag in enumerate(tw_core.TAGS)})\n"
        "assert len(tw_core.extract_units([100, 101], tags, 1)) == 1\n"
        "assert tw_core.parallel_stats([100], tags).total_tokens == 1"
    )
