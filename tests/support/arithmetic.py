"""Checks of worked arithmetic in texts."""

import math
import re


def holds_true_equations(text: str) -> int:
    """Asserts every `a * b + c = d = …` in the text and returns how many equations there were."""
    found = 0
    for chain in re.findall(r"\d+(?: [*+=] \d+)+", text):
        sides = chain.split(" = ")
        values = {sum(math.prod(map(int, term.split(" * "))) for term in side.split(" + ")) for side in sides}
        assert len(values) == 1, chain
        found += len(sides) - 1
    assert found, text
    return found
