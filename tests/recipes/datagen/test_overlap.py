"""Numbers and runs of words: what is shared between siblings, what an outline gives away."""

import pytest

from tw_recipes.datagen.overlap import all_numbers, leaks, numbers, results, shared_numbers, shared_runs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 12, then 007 and 0.50", {"12", "0.50"}),
        ("1,234 is 1234", {"1234"}),
        ("digits 1 2 3", set()),
        ("(3,14) and 1,23", {"3,14", "1,23"}),
        ("2w72x7", {"72"}),
    ],
)
def test_numbers_that_mean_something_by_themselves(text, expected):
    assert numbers(text) == expected
    assert expected <= all_numbers(text)


def test_results_stand_right_of_an_equals_sign():
    assert results("So $x = \\sqrt{3}$, y = 2 + 5, and n is 14. It is even.") == ["\\sqrt{3}", "2 + 5", "14"]


def test_numbers_of_a_sibling_count_unless_they_were_known_before():
    bodies = ["we find 41 and 57", "41 plus 57 gives 98", "12 alone"]
    assert shared_numbers(bodies, "") == [(1.0, 2), (pytest.approx(2 / 3), 2), (0.0, 0)]
    assert shared_numbers(bodies, "given 41, 57")[0] == (0.0, 0)


def test_wording_of_a_sibling_counts_in_runs_of_eight():
    same = "the same eight words stand here once again"
    assert [share for share, _ in shared_runs([same, same, "not here at all"], "")] == [1.0, 1.0, 0.0]
    assert shared_runs([same, same], same)[0] == (0.0, 0)


BODY = "Take the case k = 10 of the first kind. Then 10 * 7 = 70 and by symmetry the sum of both parts must be n = 5"


@pytest.mark.parametrize(
    ("outline", "leak"),
    [
        ("Work out the case k = 10", None),
        ("Find the sum by symmetry", None),
        ("Show that the product is 70", "70"),
        ("Show n = 5", "5"),
        ("Note that the sum of both parts must be a number", "of both parts must"),
        ("Compute 2 + 3", None),
    ],
)
def test_an_outline_may_say_what_the_thread_is_about_but_not_what_it_finds(outline, leak):
    found = leaks(outline, [BODY], "The problem.")
    assert found == leak if leak is None or len(leak) < 3 else leak in found


def test_what_stands_before_the_block_is_no_leak():
    assert leaks("Use that the product is 70", [BODY], "Let p = 70.") is None
    assert leaks("Show n = 5", [BODY], "Suppose n = 5.") is None
