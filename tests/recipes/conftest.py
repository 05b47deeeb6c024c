"""A model folder and its tokenizer, for commands that load one; a module that needs another defines its own."""

import pytest
from transformers import AutoTokenizer

from tests.support.rollouts import model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)
