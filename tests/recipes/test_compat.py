"""Versions of transformers and TRL outside of the tested range, or none: an ImportError that says what to install."""

from importlib.metadata import PackageNotFoundError

import pytest
from datasets import Dataset

from tests.support.models import tiny_model
from tests.support.sft import byte_tokenizer
from tw_recipes import TransformersEngine, TrieSFTConfig, TrieSFTTrainer, _compat, install


def _installed(monkeypatch, found):
    def version(package):
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(_compat, "version", version)


@pytest.mark.parametrize(
    ("package", "found"), [("transformers", "4.57.1"), ("transformers", "6.0.0"), ("trl", "1.15.2"), ("trl", "1.18.0")]
)
def test_versions_outside_of_the_range_are_refused(monkeypatch, package, found):
    _installed(monkeypatch, found)
    with pytest.raises(ImportError, match=rf"{package} must be .*, got {found}.*pip install '{package}[<>]"):
        _compat.require(package)


@pytest.mark.parametrize(
    ("package", "found"), [("transformers", "5.17.0"), ("transformers", "5.25.0.dev0"), ("trl", "1.17.3")]
)
def test_versions_within_the_range_are_taken(monkeypatch, package, found):
    _installed(monkeypatch, found)
    _compat.require(package)


@pytest.mark.parametrize("package", _compat.SUPPORTED)
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package):
    _installed(monkeypatch, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed; pip install 'threadweaver\[recipes\]'"):
        _compat.require(package)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
def test_install_trainer_and_engine_ask_first(monkeypatch, tmp_path):
    model, args = tiny_model("qwen3"), TrieSFTConfig(str(tmp_path), use_cpu=True, report_to=[])
    rows = Dataset.from_dict({"units": [[[[4], [5]]]]})
    _installed(monkeypatch, "0.1")
    with pytest.raises(ImportError, match="transformers must be"):
        install(model)
    with pytest.raises(ImportError, match="transformers must be"):
        TransformersEngine(model, eos_ids=[1])
    with pytest.raises(ImportError, match="trl must be"):
        TrieSFTTrainer(model, args, train_dataset=rows, processing_class=byte_tokenizer())
