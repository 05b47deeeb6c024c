"""A few fork/join texts as data set rows."""

FORK_TEXT = (
    "Two parts.\n<Parallel>\n<Outlines>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n</Outlines>\n"
    "<Thread>\n1: two by two is {a}\n</Thread><Thread>\n2: three by three is {b}\n</Thread>\n</Parallel>\nSum {c}."
)
CHAIN_TEXT = "No fork: {a} and {b} make {c}."


def _row(text: str, a: int, b: int) -> dict[str, str]:
    return {"prompt": f"What is {a} + {b}? ", "text": text.format(a=a, b=b, c=a + b)}


FORK_ROWS = [_row(FORK_TEXT, a, 2 * a + 1) for a in range(4, 10)]
CHAIN_ROWS = [_row(CHAIN_TEXT, a, a + 3) for a in range(3)]
MALFORMED_ROW = {"prompt": "Broken? ", "text": FORK_TEXT.replace("</Outlines>", "")}
