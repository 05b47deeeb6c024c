"""check_format: the recorded cases, each problem with its place, and the same rules on ids."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given

from tests.support.trajectories import TAG_IDS, CharTokenizer, bpe_tokenizer, tag_soups, trajectories
from tw_core import FormatReport, GrammarError, TagIds, Trajectory, check_format, check_ids, parse, render
from tw_core.check import _check_options

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "format_cases.json").read_text())
CHAR = CharTokenizer()
CHAR_TAGS = TagIds.from_tokenizer(CHAR)

# Cases where SPEC section 1 is stricter or saner than the recorded code: place in the file -> reason.
EXCLUDED = {
    17: "tags outside a block are no structure: a problem",
    155: "a stray </Conclusion> after the block: a tag outside a block",
    171: "<b> in a conclusion is none of our tags: plain text",
    173: "<n> in an outline is mathematics: plain text",
    190: "<b> in a thread is none of our tags: plain text",
    193: "reversed tags: </Parallel> before an unclosed <Parallel>",
    225: "outlines without a <Parallel> (the tag is broken by a newline): tags outside a block",
}


def _verdicts(text: str) -> str:
    return "".join(
        str(
            int(
                check_format(
                    text,
                    nested=False,
                    require_block=options["treat_no_parallel_as_format_error"],
                    allow_text_between_threads=options["allow_nonempty_whitespace"],
                    conclusion="optional" if options["skip_conclusion_check"] else "required",
                ).ok
            )
        )
        for options in GOLDEN["meta"]["option_combinations"]
    )


@pytest.mark.parametrize("place", [place for place in range(len(GOLDEN["cases"])) if place not in EXCLUDED])
def test_recorded_cases(place: int) -> None:
    kind, text, accepted, *_ = GOLDEN["cases"][place]
    assert _verdicts(text) == accepted, (kind, text)


@pytest.mark.parametrize("place", EXCLUDED, ids=EXCLUDED.get)
def test_excluded_cases_differ_as_the_reason_says(place: int) -> None:
    _, text, accepted, *_ = GOLDEN["cases"][place]
    assert "1" in accepted or "1" in _verdicts(text)
    assert _verdicts(text) != accepted
    if "plain text" in EXCLUDED[place]:  # without the foreign tag both agree
        assert _verdicts(re.sub("<[bn]>", "", text)) == _verdicts(text)
    else:
        assert any(problem.kind == "stray_tag" for problem in check_format(text).problems)


@given(trajectories())
def test_canonical_trajectories_are_canonical(trajectory: Trajectory) -> None:
    text = render(trajectory)
    assert check_format(text, canonical=True) == (True, ())
    assert check_format(text, nested=False).ok == all(
        not thread.blocks for block in trajectory.blocks for thread in block.threads
    )


@given(tag_soups)
def test_text_and_ids_have_the_same_problems(text: str) -> None:
    """The published code has five parsers that disagree; here two sources share one machine and one set of rules."""
    problems = check_format(text).problems
    ids = CHAR.encode(text)
    starts = [len(CHAR.decode(ids[:row])) for row in range(len(ids) + 1)]
    on_ids = check_ids(ids, CHAR_TAGS).problems
    assert [(starts[p.offset], p.kind) for p in on_ids] == [(p.offset, p.kind) for p in problems]


@given(trajectories(conclusions=False))
def test_a_real_tokenizer_writes_ids_that_pass(trajectory: Trajectory) -> None:
    text = render(trajectory)
    assert check_ids(BPE.encode(text), BPE_TAGS).ok
    assert check_ids(BPE.encode("Q <Thread>") + BPE.encode(text), BPE_TAGS, prompt_length=len(BPE.encode("Q <Thread>")))


BPE = bpe_tokenizer()
BPE_TAGS = TagIds.from_tokenizer(BPE)

HEAD = "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
ONE, TWO, TAIL = "<Thread>\n1: x\n</Thread>", "<Thread>\n2: y\n</Thread>", "\n</Parallel>"


@pytest.mark.parametrize(
    ("text", "kind", "offset", "expected", "found"),
    [
        ("a</Parallel>", "stray_tag", 1, "no </Parallel> outside every block", "'</Parallel>'"),
        (HEAD + ONE + TWO, "unclosed", len(HEAD + ONE + TWO), "</Parallel> for the <Parallel> at 0", "the end"),
        (HEAD + ONE + TAIL, "missing", len(HEAD + ONE), "a thread for outline 2", repr(TAIL[:12])),
        (HEAD + TWO + ONE + TAIL, "order", len(HEAD) + 8, "thread 1, in outline order", "thread 2"),
        (HEAD + ONE + TWO + ONE + TAIL, "order", len(HEAD + ONE + TWO), "no more threads than outlines", "thread 1"),
        (HEAD + ONE + "\n" + TWO + TAIL, "gap", len(HEAD + ONE), "<Thread> directly after </Thread>", "'\\n'"),
        (HEAD + "so" + ONE + TWO + TAIL, "gap", len(HEAD) - 1, "only white space before <Thread>", "'\\nso'"),
        (HEAD.replace("2:", "3:") + ONE + TWO + TAIL, "number", HEAD.index("2:"), "outline number 2", "3"),
        (
            HEAD + "<Thread>x</Thread>" + TWO + TAIL,
            "number",
            len(HEAD) + 8,
            "a number and a colon after <Thread>",
            "'x'",
        ),
        ("<Parallel>" + ONE + "</Parallel>", "missing", 10, "<Outlines>", repr(ONE[:12])),
        (HEAD + "</Parallel>", "missing", len(HEAD), "at least one <Thread>", "'</Parallel>'"),
        (HEAD + HEAD[11:] + ONE + TWO + TAIL, "order", len(HEAD), "one <Outlines> a block", "another one"),
        (
            HEAD + ONE.replace("x", "</think>") + TWO + TAIL,
            "think",
            len(HEAD) + 12,
            "no think tag inside a block",
            "'</think>'",
        ),
        (HEAD + ONE + TWO + " </Parallel>", "canonical", len(HEAD + ONE + TWO), "'\\n' before </Parallel>", "' '"),
        (
            HEAD + ONE.replace("\n1:", "1 :") + TWO + TAIL,
            "canonical",
            len(HEAD) + 8,
            "'\\n1:' right after <Thread>",
            "'1 : x\\n'",
        ),
    ],
)
def test_each_problem_names_place_expected_and_found(
    text: str, kind: str, offset: int, expected: str, found: str
) -> None:
    report = check_format(text, canonical=kind == "canonical")
    assert not report
    problem = next(problem for problem in report.problems if problem.kind == kind)
    assert problem[:4] == (offset, kind, expected, found)
    assert problem.message == f"at {offset}: expected {expected}, found {found}"


def test_all_problems_are_listed_in_order() -> None:
    report = check_format("</Thread><Parallel><Outlines><Outline>x</Outline></Outlines>y<Thread>2: z")
    assert [problem.kind for problem in report.problems] == ["stray_tag", "number", "gap", "unclosed", "unclosed"]
    assert [problem.offset for problem in report.problems] == sorted(problem.offset for problem in report.problems)


def test_options() -> None:
    good = HEAD + ONE + TWO
    assert not check_format("plain", require_block=True)
    assert check_format("plain")
    assert not check_format(good + TAIL, conclusion="required")
    summed = good + "\n<Conclusion>s</Conclusion>" + TAIL
    assert check_format(summed, conclusion="required")
    assert not check_format(summed, conclusion="forbidden")
    dotted = HEAD.replace("1:", "2.1:").replace("2: b", "2.1: b") + ONE.replace("1:", "2.1:") + TAIL
    assert check_format(dotted, numbering="any")
    assert not check_format(dotted)
    nested = HEAD + ONE.replace("x", HEAD + ONE + TWO + TAIL) + TWO + TAIL
    assert check_format(nested)
    assert [p.kind for p in check_format(nested, nested=False).problems] == ["nested"]


def test_an_unknown_option_is_refused() -> None:
    """It was taken for the default. (Where beartype checks arguments it refuses them before `check_format` does.)"""
    with pytest.raises(ValueError, match="conclusion must be one of optional, required, forbidden, got 'require'"):
        _check_options("require", "any")
    with pytest.raises(ValueError, match="numbering must be one of consecutive, any, got 'all'"):
        _check_options("optional", "all")
    with pytest.raises((ValueError, TypeError), match="conclusion"):
        check_format("x", conclusion="require")  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match="numbering"):
        check_ids([], TAG_IDS, numbering="all")  # type: ignore[arg-type]


def test_ids_need_digits_to_be_checked() -> None:
    bare = TagIds.from_mapping(dict(zip(("<Parallel>", "</Parallel>"), (1, 2), strict=True)) | REST)
    assert check_ids([100], bare) == FormatReport(True, ())
    with pytest.raises(GrammarError, match=r"TagIds has no colon"):
        check_ids([1, 3, 5, 100, 6, 4, 7, 8, 2], bare)
    assert not check_ids([1, 3, 5, 100, 6, 4, 7, 8, 2], TAG_IDS)


REST = {"<Outlines>": 3, "</Outlines>": 4, "<Outline>": 5, "</Outline>": 6, "<Thread>": 7, "</Thread>": 8}


def test_the_report_reads_as_a_condition() -> None:
    assert check_format("x")
    assert parse("x").closed
    assert not check_format("</Thread>")
