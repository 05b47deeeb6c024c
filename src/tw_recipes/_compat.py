"""Every version check of transformers, trl and peft, each with the event that removes it."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

# Removed when trl makes the hooks we override public (`_get_per_token_logps_and_entropies`, `_prepare_inputs`).
SUPPORTED = {"transformers": SpecifierSet(">=5.17,<6"), "trl": SpecifierSet(">=1.16,<1.18")}


def require(package: str) -> None:
    """Raise unless the installed version of `package` is one that this library was tested with.

    Args:
        package: A key of `SUPPORTED`.

    Raises:
        ImportError: The package is missing, or its version lies outside the tested range.
    """
    wanted = SUPPORTED[package]
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(
            f"{package} is not installed; pip install 'threadweaver[recipes]' (needs {package}{wanted})"
        ) from None
    if not wanted.contains(found, prereleases=True):
        raise ImportError(
            f"{package} must be {wanted}, got {found}: its private hooks differ there; pip install '{package}{wanted}'"
        )


def continuous_batching_config(page_size: int, **options: Any) -> Any:
    """transformers' ContinuousBatchingConfig; 5.17 calls `page_size` `block_size`. Removed with 5.17."""
    from dataclasses import fields

    from transformers import ContinuousBatchingConfig

    known = {field.name for field in fields(ContinuousBatchingConfig)}
    options["page_size" if "page_size" in known else "block_size"] = page_size
    return ContinuousBatchingConfig(**options)


def watch_prefix_cache(manager: Any, cached: dict[str, int]) -> None:
    """Write how many tokens of each request came from the prefix cache into `cached`, by request id.

    Removed when transformers reports it in its `GenerationOutput`.
    """
    manager.batch_processor = manager._create_batch_processor()
    cache = manager.batch_processor.cache
    search = cache.search_prefix_match

    def searched(request_id: str, prompt_ids: list[int]) -> int:
        found = search(request_id, prompt_ids)
        cached[request_id] = max(found, cached.get(request_id, 0))
        return found

    cache.search_prefix_match = searched


def when_generation_ends(manager: Any, callback: Callable[[], None]) -> None:
    """Call `callback` in the manager's thread when its loop has ended, by `stop` or by an error.

    Removed when transformers tells the handlers of every request, also of one added while the loop ends.
    """
    loop = manager._run_generation_loop

    def watched(*args: Any, **options: Any) -> None:
        try:
            loop(*args, **options)
        finally:
            callback()

    manager._run_generation_loop = watched


def no_checkpointing() -> dict[str, bool]:
    """Trainer arguments that turn activation checkpointing off, which TRL turns on; its name is new in transformers.

    Removed when TRL follows transformers' new name and 5.17 is no longer supported.
    """
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": False}


def cache_argument(model: Any) -> str:
    """Name of the argument that gives a model its cache; 5.24 renames `past_key_values`. Removed with 5.17."""
    from inspect import signature

    return "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"
