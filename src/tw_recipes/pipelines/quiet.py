"""Runs a pipeline without the libraries' own progress bars and warnings."""

import warnings
from collections.abc import Callable
from typing import Any

from transformers.utils import logging as transformers_logging


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run with the libraries' own progress bars and warnings off, and put them back."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        verbosity, shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function(*args, **kwargs)
        finally:
            transformers_logging.set_verbosity(verbosity)
            if shown:
                transformers_logging.enable_progress_bar()

    return wrapped
