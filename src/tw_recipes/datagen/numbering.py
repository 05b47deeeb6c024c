"""Lines of a trace, numbered as the annotator sees them; nothing is lost between two line feeds.

Lines end at a line feed and nowhere else, so that "".join of them is the text, whatever other separators it holds.
Guarded by tests/recipes/datagen/test_layout.py.
"""

import re
from dataclasses import dataclass

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Lines:
    """The lines of a text, each with its line feed.

    Attributes:
        lines: "".join of them is the text.
    """

    lines: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Lines":
        """Split a text."""
        return cls(tuple(_LINE.findall(text)))

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, first: int, last: int) -> str:
        """Lines first to last as they are, 1-based, both included; "" where last < first."""
        return "".join(self.lines[max(first, 1) - 1 : max(last, 0)])

    def trimmed(self, first: int, last: int) -> tuple[int, int]:
        """The range without blank lines at its two ends; last < first if all are blank."""
        while first <= last and not self.lines[first - 1].strip():
            first += 1
        while last >= first and not self.lines[last - 1].strip():
            last -= 1
        return first, last

    def blank(self, first: int, last: int) -> bool:
        """Whether lines first to last hold nothing but white space."""
        return not self.text(first, last).strip()

    def numbered(self, first: int = 1, last: int | None = None) -> str:
        """Lines with their numbers, "L12| text"; no line of a trace can look like anything but a line of it."""
        stop = len(self) if last is None else last
        return "\n".join(f"L{n}| {self.lines[n - 1].rstrip()}" for n in range(first, stop + 1))


def quoted(text: str, mark: str = "> ") -> str:
    """Every line of a text behind a mark, so that none can pass for the words around it."""
    return "\n".join(mark + line for line in text.split("\n"))
