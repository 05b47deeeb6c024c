"""What is remembered of a packed row: for one stream, never inside a CUDA graph capture, for all views of one row."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support.attention_inputs import chain, random_forest, small_tries, star
from tw_kernels import AttentionCall, trie_attention
from tw_kernels.trie_attention import flex, memo
from tw_kernels.trie_attention.plan import BlockPlan, cached_plan

TRIE = small_tries()[6]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    memo._values.clear()


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


class Gpu:
    """The stream that is current, and whether it is being captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 7, False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def by_object(end: Tensor) -> Tensor:
    return memo.once_per_tensor(end, "test", lambda alias: alias + 1)


def by_rows(end: Tensor) -> Tensor:
    return memo.once_per_rows([end], "test", lambda: end + 1)


def converted(end: Tensor) -> Tensor:
    x = torch.zeros(end.shape[0], 1, 8)
    return AttentionCall.build(x, x, x, end).subtree_end


def planned(end: Tensor) -> BlockPlan:
    return cached_plan(end, None, None, 16)


WAYS = [by_object, by_rows, converted, planned]


@pytest.mark.parametrize("way", WAYS)
def test_another_stream_gets_its_own(way, gpu: Gpu) -> None:
    """Nothing orders its reads after what the first stream writes."""
    end = chain(50).subtree_end.long().as_subclass(OnGpu)
    first = way(end)
    assert way(end) is first
    gpu.stream = 8
    other = way(end)
    assert other is not first
    assert way(end) is other
    gpu.stream = 7
    assert way(end) is first


@pytest.mark.parametrize("way", WAYS)
def test_nothing_goes_into_a_capture_or_comes_out_of_it(way, gpu: Gpu) -> None:
    """A replay would read what was made of the rows before it, and other calls what only a replay fills."""
    end = chain(50).subtree_end.long().as_subclass(OnGpu)
    before = way(end)
    gpu.capturing = True
    inside = way(end)
    assert inside is not before
    assert way(end) is not inside
    gpu.capturing = False
    assert way(end) is before


def test_int64_views_are_converted_and_planned_once() -> None:
    """Each layer makes another view of the (1, N) input: it was converted for each, and so planned for each."""
    end = TRIE.subtree_end.long()[None]
    first = converted(end[0])
    assert first.dtype == torch.int32
    assert converted(end[0]) is converted(end.view(-1)) is first
    assert planned(converted(end[0])) is planned(first)
    assert converted(end[0].clone()) is not first


def test_a_write_into_int64_rows_is_seen() -> None:
    end = chain(100).subtree_end.long()
    converted(end[:])
    end.copy_(torch.arange(1, 101))
    assert torch.equal(converted(end[:]), torch.arange(1, 101, dtype=torch.int32))
    for seed in range(8):  # a freed address is no key
        other = random_forest(seed, 200).subtree_end[:100].clamp(max=100).long()
        assert torch.equal(converted(other[:]).long(), other)
        del other


def test_int64_rows_of_inference_mode_serve_training() -> None:
    end = chain(30).subtree_end.long()
    with torch.inference_mode():
        inside = converted(end)
        of_inference = end.clone()
        assert converted(of_inference) is not converted(of_inference)
    assert converted(end) is inside
    assert not inside.is_inference()


def test_int64_rows_inside_of_torch_func() -> None:
    """Its wrappers have no storage to be found again by."""
    q, k, v = (torch.randn(30, 1, 8) for _ in range(3))
    end = star(10, [12, 8]).subtree_end

    def total(q: Tensor, end: Tensor) -> Tensor:
        return trie_attention(q, k, v, end, impl="reference").sum()

    assert torch.equal(torch.func.grad(total)(q, end.long()), torch.func.grad(total)(q, end))


def test_flex_makes_its_score_function_once_per_row() -> None:
    q, k, v = (torch.randn(TRIE.num_rows, 1, 16) for _ in range(3))
    end = TRIE.subtree_end.clone()

    def score_mod(**options: float) -> object:
        return flex._score_mod(AttentionCall.build(q, k, v, end, **options))

    assert score_mod() is None
    assert score_mod(scale=0.25) is None
    first = score_mod(scale=0.5, softcap=2.0)
    assert first is not None
    assert score_mod(scale=0.5, softcap=2.0) is first
    assert len({id(score_mod(**options)) for options in ({"scale": 0.5}, {"softcap": 2.0}, {"softcap": 3.0})}) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_a_captured_graph_reads_the_rows_of_its_replay_on_the_gpu(impl: str) -> None:
    """int64 rows that were converted before the capture: the replay read that conversion, whatever the rows held."""
    if impl == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    n = 600
    q, k, v = (torch.randn(n, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    tries = [random_forest(seed, 700).subtree_end[:n].clamp(max=n).long().cuda() for seed in (1, 2)]
    end = tries[0].clone()
    with torch.no_grad():
        for _ in range(2):
            trie_attention(q, k, v, end, impl=impl)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = trie_attention(q, k, v, end, impl=impl)
        for trie in (tries[1], tries[0]):
            end.copy_(trie)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, trie_attention(q, k, v, trie, impl=impl))
