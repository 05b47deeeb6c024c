"""Training data from sequential traces (stage 1) and from the model itself (stage 2); SPEC section 7.

Names load on first use (PEP 562).
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Selection": "self_training",
    "self_train_select": "self_training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
