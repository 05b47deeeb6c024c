"""Training data from sequential traces (stage 1) and from the model itself (stage 2); SPEC section 7.

Names load on first use (PEP 562).
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Annotator": "annotator",
    "JobOptions": "generate",
    "Selection": "self_training",
    "SelfTrainOptions": "rounds",
    "annotate": "pipeline",
    "extract_steps": "steps",
    "finish": "filter",
    "generate_data": "generate",
    "propose_blocks": "blocks",
    "rewrite_threads": "rewrite",
    "self_train_rounds": "rounds",
    "self_train_select": "self_training",
    "write_outlines": "outlines",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
