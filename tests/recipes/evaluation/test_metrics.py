"""Statistics against numbers worked out by hand."""

import math

import numpy as np
import pytest

from tw_recipes.evaluation.metrics import Sample, accuracy, bootstrap, measures, pass_at_k, speedup, wilson


def sample(problem, correct=True, total=100, path=50, k=0, blocks=1, threads=2, seconds=1.0, **more):
    fields = {"grade": "graded", "extracted": "1", "status": "done", "format_ok": True} | more
    return Sample(
        problem=problem,
        sample=k,
        correct=correct,
        total_tokens=total,
        critical_path_tokens=path,
        num_blocks=blocks,
        num_threads=threads,
        seconds=seconds,
        **fields,
    )


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(3 / 6)  # 3 of the 6 pairs hold it
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert pass_at_k(3, 0, 3) == 0.0
    assert pass_at_k(3, 1, 3) == 1.0
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(3, 1, 4)


def test_wilson_at_8_of_10():
    # (0.8 + z²/20) / (1 + z²/10) ± z / (1 + z²/10) * sqrt(0.016 + z²/400), z = 1.96
    low, high, method = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert method.startswith("Wilson")
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == pytest.approx(1.0)


def test_bootstrap_of_a_fair_coin_matches_the_normal_interval():
    values = [0.0, 1.0] * 200
    low, high, _ = bootstrap(values)
    half = 1.96 * 0.5 / math.sqrt(400)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.006), pytest.approx(0.5 + half, abs=0.006))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap([0.25] * 9)[:2] == (0.25, 0.25)


def test_accuracy_with_one_and_with_several_samples():
    one = accuracy([sample("a"), sample("b", False), sample("c"), sample("d")])
    assert one.value == 0.75
    assert one.interval.method.startswith("Wilson")
    assert one.pass_at == {1: 0.75}
    # a: 1 of 3, b: 3 of 3, c: 0 of 3
    rights = {"a": [1, 0, 0], "b": [1, 1, 1], "c": [0, 0, 0]}
    several = accuracy([sample(name, bool(r), k=k) for name, row in rights.items() for k, r in enumerate(row)])
    assert several.value == pytest.approx(4 / 9)
    assert several.pass_at == {1: pytest.approx(4 / 9), 2: pytest.approx((2 / 3 + 1 + 0) / 3), 3: pytest.approx(2 / 3)}
    assert several.interval.method.startswith("bootstrap over 3 problems")
    with pytest.raises(ValueError, match=r"same number of samples, got \[1, 2\]"):
        accuracy([sample("a"), sample("a", k=1), sample("b")])


def test_speedup_by_hand():
    ours = [sample("a", True, path=50), sample("a", False, path=100, k=1), sample("b", False, path=80), sample("x")]
    base = [sample("a", True, total=100, seconds=3.0), sample("b", True, total=120), sample("y")]
    found = speedup(ours, base)
    assert found.per_problem == {"a": pytest.approx(100 / 75), "b": pytest.approx(1.5)}
    assert found.mean == pytest.approx((4 / 3 + 1.5) / 2)
    assert found.ratio_of_means == pytest.approx(110 / 77.5)
    assert found.mean_correct == found.max_correct == pytest.approx(2.0)  # a alone, from its correct sample
    assert found.wall == pytest.approx((3.0 + 1.0) / 2)
    nobody = speedup([sample("a", False)], [sample("a")])
    assert nobody.mean_correct is None
    assert nobody.max_correct is None
    with pytest.raises(ValueError, match="none of the problems"):
        speedup([sample("a")], [sample("b")])


def test_measures_by_hand():
    found = measures(
        [
            sample("a", total=100, path=40, blocks=1, threads=3, seconds=1.0),
            sample("b", total=50, path=50, blocks=0, threads=0, seconds=3.0, format_ok=False, status="length"),
            sample("c", total=60, path=30, blocks=2, threads=4, seconds=2.0, grade="timeout", correct=False),
        ]
    )
    assert found["total_tokens"] == pytest.approx(70)
    assert found["token_latency"] == pytest.approx(40)
    assert found["activation_ratio"] == pytest.approx(2 / 3)
    assert found["threads_per_block"] == pytest.approx(7 / 3)
    assert found["blocks"] == pytest.approx(1.0)
    assert found["format_correctness"] == pytest.approx(2 / 3)
    assert found["finished"] == pytest.approx(2 / 3)
    assert found["ungraded"] == pytest.approx(1 / 3)
    assert found["wall_s"] == pytest.approx(2.0)
    assert found["wall_s_p95"] == pytest.approx(np.percentile([1, 2, 3], 95))
