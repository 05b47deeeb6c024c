"""Exceptions of tw_core.

    ThreadWeaverError
    └── TrieError (also a ValueError)     bad sequences, units or tries
        ├── ShapeError                    a tensor or array has the wrong shape or dtype
        ├── GrammarError                  text, tags or token ids break the fork/join format
        └── BudgetError                   one sequence alone exceeds a token budget

Every message names the argument, the expected value, the received value and the next step.
"""


class ThreadWeaverError(Exception):
    """Root of every error this library raises on purpose."""


class TrieError(ThreadWeaverError, ValueError):
    """Sequences, units or tries that cannot be what they claim to be."""


class ShapeError(TrieError):
    """A tensor or array whose shape or dtype differs from the documented one."""


class GrammarError(TrieError):
    """Text, tags or token ids that break the fork/join format (SPEC section 1)."""


class BudgetError(TrieError):
    """A sequence that alone exceeds the token budget, so that no split can help."""
