"""Warnings of the libraries below us, which `filterwarnings = error` would turn into failures."""

import pytest

_IGNORED = (
    # transformers 5.24 renames gradient_checkpointing; trl and peft still use the old name.
    "ignore:.*activation_checkpointing:FutureWarning",
    "ignore:You are using 'rollout_func', which is an experimental feature:UserWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "recipes/grpo" in str(item.path):
            for ignored in _IGNORED:
                item.add_marker(pytest.mark.filterwarnings(ignored))
