"""benchmarks/bench_heads.py and the clock behind it, on a CPU."""

import pytest
import torch
from benchmarks.timing import LEAD_MS, MOST_LEAD_MS, Timing, lead_ms

from benchmarks import bench_heads, timing
from tests.support.attention_inputs import star


def test_every_result_is_judged_by_exact_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were judged by the first implementation, which judged itself; and one ran after the other."""
    monkeypatch.setattr(bench_heads, "TRIES", {"small": lambda: star(60, [40, 30])})
    monkeypatch.setattr(bench_heads, "HEADS", 4)
    monkeypatch.setattr(bench_heads, "KV_HEADS", 2)
    case = bench_heads.Case("small", 24, 16, device="cpu")
    assert case.exact["dv"].shape[-1] == 24
    order, forward = [], case.forward
    monkeypatch.setattr(case, "forward", lambda impl: order.append(impl) or forward(impl))
    rows, refused, waited = bench_heads.measure(case, ["dense", "hopper", "reference"])
    assert order[-6:] == ["dense", "reference"] * 3
    assert waited == [] or torch.cuda.is_available()
    assert [*refused] == ["small_24_16 hopper"]
    errors = {(row["impl"], row["metric"]): row["value"] for row in rows if row["metric"].endswith("_error")}
    assert len(errors) == 4
    assert all(1e-5 < error < 0.03 for error in errors.values()), errors  # bfloat16 against float32
    monkeypatch.setattr(case, "forward", lambda impl: 1.1 * forward(impl))
    assert min(case.errors("dense")) > 0.08


def test_the_lead_follows_the_slowest_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN a sequence took the host up to 29 ms a call, behind work of 5 ms."""
    times = timing._host_ms.copy()
    times.clear()
    monkeypatch.setattr(timing, "_host_ms", times)
    assert lead_ms() == LEAD_MS
    times.append(20_000.0)  # a compilation
    assert lead_ms() == LEAD_MS
    times.append(29.0)
    assert lead_ms() == pytest.approx(43.5)
    times.append(90.0)
    assert lead_ms() == MOST_LEAD_MS
    times.extend([1.0] * times.maxlen)
    assert lead_ms() == LEAD_MS
    assert Timing(1.0, 6.0, LEAD_MS).waited
    assert not Timing(1.0, 4.0, LEAD_MS).waited
    assert not Timing(1.0, 4.0).waited


@pytest.mark.gpu
def test_the_lead_covers_launches_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call's launches hide behind a longer lead: the device's time is then its own."""
    import time

    monkeypatch.setattr(timing, "_host_ms", timing._host_ms.copy())
    timing._host_ms.clear()
    x = torch.zeros(1, device="cuda")

    def slow() -> None:
        time.sleep(0.02)
        x.add_(1)

    assert timing.timed(slow).waited
    assert not timing.timed(slow).waited
