"""Tries as characters: segments are the runs without a branch, bars stand as far right as they are deep."""

import pytest
from hypothesis import given

from tests.support.sequences import sequence_sets
from tw_core import ReasoningTrie
from tw_recipes.viewer.drawing import draw_trie, segments

DRAWN = """\
rows 0..5     ......
rows 6..6          +#
rows 7..8           +##
rows 9..9           +#
rows 10..11        +##"""


def test_the_drawing():
    head = [1, 2, 3, 4, 5, 6]
    sequences = [[*head, 7, 8, 9], [*head, 7, 10], [*head, 11, 12]]
    trie = ReasoningTrie.from_sequences(sequences, [[i >= 6 for i in range(len(s))] for s in sequences])
    assert draw_trie(trie) == DRAWN
    assert draw_trie(trie, max_lines=2).endswith("\nand 3 more segments")


def test_a_long_trie_fits_the_width():
    trie = ReasoningTrie.from_sequences([[1] * 5000, [1] * 4000 + [2] * 3000])
    lines = draw_trie(trie, width=80).splitlines()
    assert max(map(len, lines)) == 80
    assert [line.index("+") for line in lines[1:]] == [lines[1].index("+")] * 2
    with pytest.raises(ValueError, match=r"width must be at least \d+ for this trie, got 20; widen the terminal"):
        draw_trie(trie, width=20)


@given(sequence_sets())
def test_segments_cut_every_trie_at_its_branches(sequences):
    trie = ReasoningTrie.from_sequences(sequences)
    found = segments(trie)
    assert [row for s in found for row in range(s.first, s.past)] == list(range(trie.num_tokens))
    assert sum(s.ends for s in found) == trie.num_sequences
    assert sum(s.trained for s in found) == int((trie.weights > 0).sum())
    parents = trie.parent.tolist()
    for s in found:
        assert parents[s.first + 1 : s.past] == list(range(s.first, s.past - 1))
        assert all(parents.count(row) == 1 for row in range(s.first, s.past - 1))
        assert s.depth == trie.position_ids[s.first]
        assert s.branch == (parents.count(parents[s.first]) > 1)
    draw_trie(trie)
