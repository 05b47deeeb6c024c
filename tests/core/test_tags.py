"""TagIds: where ids come from, how the glue is written and read, and what is refused."""

import pickle
from typing import Any

import pytest

from tests.support.trajectories import COLON, DIGITS, DOT, NEWLINE, TAG_IDS, CharTokenizer, bpe_tokenizer
from tw_core import TAGS, GrammarError, TagIds

MAPPING = {tag: place + 1 for place, tag in enumerate(TAGS)}
BPE = bpe_tokenizer()
BPE_TAGS = TagIds.from_tokenizer(BPE)


def test_glue_of_a_mapping() -> None:
    number = (DIGITS[2], DOT, DIGITS[1])
    assert TAG_IDS.thread_header("2.1", first=True) == (NEWLINE, 7, NEWLINE, *number, COLON)
    assert TAG_IDS.thread_header("2.1", first=False) == (7, NEWLINE, *number, COLON)
    assert TAG_IDS.join_newline == (NEWLINE,)
    assert TAG_IDS.forced_thread_close == (NEWLINE, 8)
    assert TAG_IDS.forced_block_close == (NEWLINE, 2)


def test_glue_of_a_tokenizer_is_encoded_apart() -> None:
    """Seams: a tokenizer that merges across them in running text must not do so in the glue."""
    whole = BPE.encode("\n<Thread>\n1: plan", add_special_tokens=False)
    header = list(BPE_TAGS.thread_header("1", first=True))
    assert BPE.decode(header) == "\n<Thread>\n1:"
    assert whole[: len(header)] != header  # this tokenizer merges "1: plan"-like pieces
    label = BPE.encode("\n12:", add_special_tokens=False)
    assert BPE_TAGS.thread_header("12", first=False) == (BPE_TAGS.thread_open, *label)


@pytest.mark.parametrize("number", ["1", "2", "10", "2.1", "1.10.3"])
@pytest.mark.parametrize("tail", [": plan", ":", ":\n", ":2:", " : x"])
@pytest.mark.parametrize("lead", ["", " ", "\n"])
def test_numbers_are_read_in_any_encoding(number: str, tail: str, lead: str) -> None:
    assert BPE_TAGS.read_number(BPE.encode(lead + number + tail, add_special_tokens=False)) == number


@pytest.mark.parametrize("text", ["", "one: x", "1", "1 x:", ".1:", "1.:", ":1", "x1:", "1..2:", "١:"])
def test_what_is_no_number_is_not_read(text: str) -> None:
    for tokenizer in (BPE, CharTokenizer()):
        tags = TagIds.from_tokenizer(tokenizer)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tags.read_number(ids) is None
        assert tags.read_label(ids) is None


def test_digits_may_be_whole_numbers() -> None:
    tags = TagIds.from_mapping(MAPPING, newline=NEWLINE, colon=[COLON, COLON], digits={"12": [50, 51], "3": 52})
    assert tags.label("12") == (NEWLINE, 50, 51, COLON, COLON)
    assert tags.read_number([50, 51, COLON, COLON, 99]) == "12"
    assert tags.read_number([NEWLINE, 52, COLON, COLON]) == "3"
    assert tags.read_number([50, COLON, COLON]) is None
    with pytest.raises(GrammarError, match=r"digits must hold '13' or each of its characters, lacks \['1'\]"):
        tags.label("13")


def test_value_semantics() -> None:
    assert pickle.loads(pickle.dumps(BPE_TAGS)) == BPE_TAGS
    assert hash(pickle.loads(pickle.dumps(TAG_IDS))) == hash(TAG_IDS)
    assert pickle.loads(pickle.dumps(BPE_TAGS)).label("7") == BPE_TAGS.label("7")
    assert TagIds.from_mapping(MAPPING) != TAG_IDS


def test_the_conclusion_pair_is_optional() -> None:
    tags = TagIds.from_mapping({tag: MAPPING[tag] for tag in TAGS[:8]})
    assert tags.conclusion_open is None
    assert tags.conclusion_close is None
    one_missing = bpe_tokenizer(tags=False)
    one_missing.add_tokens(list(TAGS[:9]), special_tokens=True)
    assert TagIds.from_tokenizer(one_missing).ids[8:] == (None, None)


@pytest.mark.parametrize(
    ("mapping", "glue", "message"),
    [
        ({**MAPPING, "<Tread>": 99}, {}, r"missing: none, unknown: \['<Tread>'\]; fix the keys"),
        (dict.fromkeys(TAGS[1:], 1), {}, r"missing: \['<Parallel>'\]"),
        ({**MAPPING, "<Thread>": 1}, {}, r"<Parallel> and <Thread> share the id 1; give every tag its own token"),
        ({**MAPPING, "<Thread>": -7}, {}, r"the id of <Thread> must be a non-negative integer, got -7"),
        ({**MAPPING, "<Thread>": True}, {}, r"the id of <Thread> must be a non-negative integer, got True"),
        ({tag: MAPPING[tag] for tag in TAGS[:9]}, {}, r"must both have an id or both be None"),
        (MAPPING, {"newline": [-1]}, r"newline must be a token id or a non-empty sequence of them, got \[-1\]"),
        (MAPPING, {"colon": []}, r"colon must be a token id"),
        (MAPPING, {"digits": [1, 2]}, r'digits must list the ids of "0".."9" \(and "."\), got 2 ids'),
    ],
)
def test_bad_mappings_are_named(mapping: dict[str, Any], glue: dict[str, Any], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        TagIds.from_mapping(mapping, **glue)


@pytest.mark.parametrize(
    ("glue", "call", "missing"),
    [
        ({}, lambda tags: tags.join_newline, "newline"),
        ({"newline": 20}, lambda tags: tags.label("1"), "colon"),
        ({"newline": 20, "colon": 21}, lambda tags: tags.label("1"), "digits"),
        ({"newline": 20, "colon": 21}, lambda tags: tags.read_number([31, 21]), "digits"),
        ({}, lambda tags: tags.read_label([31, 21]), "colon"),
    ],
)
def test_missing_glue_names_itself_and_the_next_step(glue: dict[str, int], call: Any, missing: str) -> None:
    with pytest.raises(GrammarError, match=rf"TagIds has no {missing}.*pass {missing}=\.\.\. to TagIds.from_mapping"):
        call(TagIds.from_mapping(MAPPING, **glue))


def test_numbers_are_checked_before_they_are_written() -> None:
    with pytest.raises(GrammarError, match=r"number must match .* got '1a'"):
        TAG_IDS.thread_header("1a", first=True)


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    with pytest.raises(GrammarError, match=r"<Parallel> must be one token .*'<'.*add_tag_tokens\(model, tokenizer\)"):
        TagIds.from_tokenizer(bpe_tokenizer(tags=False))


def test_an_unknown_token_is_not_a_tag() -> None:
    class Unknown(CharTokenizer):
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [99]

        def decode(self, ids: Any) -> str:
            return "<unk>"

    with pytest.raises(GrammarError, match=r"<Parallel> must be one token of the tokenizer, got 1 \['<unk>'\]"):
        TagIds.from_tokenizer(Unknown())


def test_a_tokenizer_that_cannot_write_numbers_is_refused() -> None:
    """Else no outline would ever be read as numbered, and decoding would silently never fork."""

    class NoDigits(CharTokenizer):
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [99 if 148 <= token <= 157 else token for token in super().encode(text)]

    with pytest.raises(
        GrammarError, match=r"must write '\\n1:' in ids that read back as 1, got \['\\n', 'id 99', ':'\]"
    ):
        TagIds.from_tokenizer(NoDigits())
