"""Texts of many rows at once, and fork/join blocks made of them: what the tasks share.

A piece is a constant string, or characters of shape (n, width), uint8, one row a problem. A text is a list of pieces,
so that the words of ten thousand solutions are laid out once.

Tests: tests/recipes/tasks/test_products.py, test_multiply.py.
"""

from collections.abc import Sequence

import numpy as np

Piece = str | np.ndarray
Pieces = list[Piece]


def strings(pieces: Sequence[Piece]) -> list[str]:
    """The texts, one a row.

    Args:
        pieces: ASCII; at least one is an array.
    """
    count = next(len(piece) for piece in pieces if isinstance(piece, np.ndarray))
    table = np.concatenate(
        [
            np.broadcast_to(np.frombuffer(piece.encode(), np.uint8), (count, len(piece)))
            if isinstance(piece, str)
            else piece
            for piece in pieces
        ],
        axis=1,
    )
    return [line.tobytes().decode("ascii") for line in table]


def digits(values: np.ndarray, width: int) -> np.ndarray:
    """Digits from the lowest place up. values (n,) -> (n, width) characters."""
    return chars(values[:, None] // 10 ** np.arange(width) % 10)


def chars(values: np.ndarray) -> np.ndarray:
    """Digits 0..9 of any integer dtype as characters, same shape."""
    return (values + ord("0")).astype(np.uint8)


def fork(outlines: Sequence[str], bodies: Sequence[Pieces]) -> Pieces:
    r"""A block in canonical form: outline i announces thread i.

    Args:
        outlines: One line each.
        bodies: What follows "1:", "2:", …: starts with a blank, ends with a newline.
    """
    pieces: Pieces = ["<Parallel>\n<Outlines>\n"]
    pieces += [f"<Outline>{number}: {outline}</Outline>\n" for number, outline in enumerate(outlines, 1)]
    pieces += ["</Outlines>\n"]
    for number, body in enumerate(bodies, 1):
        pieces += [f"<Thread>\n{number}:", *body, "</Thread>"]
    return [*pieces, "\n</Parallel>\n"]
