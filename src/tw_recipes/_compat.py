"""Every version check of transformers, trl and peft, each with the event that removes it."""

from importlib.metadata import PackageNotFoundError, version

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
