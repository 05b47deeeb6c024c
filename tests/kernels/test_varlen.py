"""The segments of impl="varlen": queries cut where the trie forks, keys gathered along each path."""

import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.attention_inputs import TrieShape, comb, random_forest, small_tries
from tests.support.tolerances import Case, assert_as_exact_as_eager, exact_results, make_problem, run_eager, run_impl
from tw_kernels import trie_attention
from tw_kernels.trie_attention import varlen
from tw_kernels.trie_attention.varlen import _GatherRows, make_segments

TRIES = [*small_tries(), comb(30, 1, 1), *(random_forest(seed, 120, mean_length=1 + seed) for seed in range(4))]


def path(trie: TrieShape, row: int) -> np.ndarray:
    """Rows from the root to `row`, from the definition of subtree_end."""
    return torch.nonzero(trie.subtree_end[: row + 1] > row)[:, 0].numpy()


@pytest.mark.parametrize("longest", [None, 3])
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("trie", TRIES, ids=str)
def test_segments_gather_the_path_of_their_rows(trie: TrieShape, window: int | None, longest: int | None) -> None:
    segments = make_segments(trie.subtree_end, window, longest)
    assert longest is None or segments.max_queries <= longest
    queries, keys = segments.cu_queries.tolist(), segments.cu_keys.tolist()
    key_rows = np.arange(trie.num_rows) if segments.key_rows is None else segments.key_rows.numpy()
    assert queries[0] == keys[0] == 0
    assert (queries[-1], keys[-1]) == (trie.num_rows, len(key_rows))
    for i in range(len(queries) - 1):
        first, last = queries[i], queries[i + 1] - 1
        whole = path(trie, last)
        got = key_rows[keys[i] : keys[i + 1]]
        assert np.array_equal(whole[len(whole) - len(got) :], got)  # the end of the path: bottom-right causal
        assert np.array_equal(got[-(last - first + 1) :], np.arange(first, last + 1))
        seen = len(path(trie, first)) if window is None else min(window, len(path(trie, first)))
        assert len(got) - (last - first) == seen  # no row that the first query cannot see
    assert segments.max_queries == max(np.diff(queries))
    assert segments.max_keys == max(np.diff(keys))


def test_segments_are_maximal() -> None:
    """A row starts a segment exactly when it is a root or has a sibling."""
    for trie in TRIES:
        starts = set(make_segments(trie.subtree_end).cu_queries.tolist()[:-1])
        parents = [int(path(trie, row)[-2]) if trie.depth[row] else -1 for row in range(trie.num_rows)]
        want = {row for row, parent in enumerate(parents) if parent < 0 or parents.count(parent) > 1}
        assert starts == want


def test_chains_gather_nothing() -> None:
    """Ordinary padding-free packing is the varlen batch as it stands."""
    trie = next(trie for trie in TRIES if trie.name == "chain77")
    assert make_segments(trie.subtree_end).key_rows is None
    assert make_segments(next(t for t in TRIES if t.name == "three_rows_apart").subtree_end).key_rows is None
    assert make_segments(next(t for t in TRIES if t.name == "forest").subtree_end).key_rows is not None


@pytest.mark.parametrize("deterministic", [False, True])
def test_gathered_gradients_add_up_in_float32(deterministic: bool) -> None:
    """600 segments under one row: adding their gradients in float16 stalls at 2,048 x 2^-11."""
    x = torch.ones(3, 2, dtype=torch.float16, requires_grad=True)
    rows = torch.cat([torch.zeros(6000, dtype=torch.int64), torch.tensor([2])])
    _GatherRows.apply(x, rows, deterministic).backward(torch.full((6001, 2), 0.5, dtype=torch.float16))
    assert x.grad.tolist() == [[3000.0, 3000.0], [0.0, 0.0], [0.5, 0.5]]


def fake_flash_attn(calls: list[dict]) -> types.ModuleType:
    """flash_attn_varlen_func by its documented meaning, in plain torch; records its keyword arguments."""
    module = types.ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: object
    ) -> tuple[Tensor, Tensor, None]:
        calls.append(options)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert q.shape[2] % 8 == 0
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert options["causal"]
        assert options["return_attn_probs"]
        left, right = options["window_size"]
        assert right == 0
        outs, lses = [], []
        for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
            assert q1 - q0 <= max_q
            assert k1 - k0 <= max_k
            group = q.shape[1] // k.shape[1]
            ks, vs = (x[k0:k1].repeat_interleave(group, 1) for x in (k, v))
            logits = torch.einsum("qhd,khd->hqk", q[q0:q1], ks) * options["softmax_scale"]
            if options["softcap"]:
                logits = options["softcap"] * torch.tanh(logits / options["softcap"])
            distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
            seen = (distance >= 0) & ((distance <= left) if left >= 0 else torch.tensor(True))
            logits = logits.masked_fill(~seen, float("-inf"))
            outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), vs))
            lses.append(logits.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses, dim=1), None

    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    "case",
    [
        Case(small_tries()[6], heads=(4, 2), dims=(16, 16)),
        Case(small_tries()[7], heads=(2, 1), dims=(20, 12), window=6, softcap=2.0, scale=0.3),
    ],
    ids=str,
)
def test_flash_attn_is_called_as_documented(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn needs a GPU; a stand-in with its documented meaning checks batch, padding, window, softcap and lse."""
    calls: list[dict] = []
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(calls))
    monkeypatch.setattr(varlen, "FLASH_ATTN_INSTALLED", True)
    problem = make_problem(case, torch.float32)
    end = case.trie.subtree_end

    def attend(call_options: dict) -> dict[str, Tensor]:
        from tests.support.tolerances import differentiate
        from tw_kernels import AttentionCall

        def attention(q: Tensor, k: Tensor, v: Tensor, sinks: None) -> tuple[Tensor, Tensor]:
            call = AttentionCall.build(q, k, v, end, **call_options)
            segments = make_segments(end, call.window)
            k, v = (x if segments.key_rows is None else x[segments.key_rows] for x in (k, v))
            return varlen._flash(call, k, v, segments)

        return differentiate(attention, problem)

    got = attend(problem.options | {"deterministic": True})
    assert_as_exact_as_eager(got, run_eager(problem), exact_results(problem), torch.float32)
    assert calls[0]["deterministic"] is True


def test_varlen_refuses_what_flash_attention_lacks() -> None:
    problem = make_problem(Case(small_tries()[2], sinks=True), torch.float32)
    end = problem.case.trie.subtree_end
    with pytest.raises(ValueError, match=r"impl='varlen' cannot run .*: sinks must be None .* one of .*reference"):
        run_impl(problem, "varlen")
    with pytest.raises(ValueError, match=r"impl='varlen' cannot run this call: softcap must be None"):
        trie_attention(problem.q, problem.k, problem.v, end, softcap=3.0, impl="varlen")


def test_varlen_without_a_kernel_refuses_calls_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It failed on import, also under impl="auto"; on a CPU it needs no kernel."""
    monkeypatch.setattr(varlen, "FLASH_ATTN_INSTALLED", False)
    monkeypatch.setattr(varlen, "_torch_varlen_options", frozenset)
    shape = {"dtype": torch.bfloat16, "shape": (9, 2, 64)}
    for device, why in (
        ("cuda", "neither flash-attn nor torch.nn.attention.varlen with windows was found"),
        ("cpu", ""),
    ):
        x = SimpleNamespace(device=torch.device(device), **shape)
        call = SimpleNamespace(q=x, v=x, sinks=None, softcap=None, deterministic=False)
        assert (varlen.why_unsupported(call) or "").startswith(why)
        assert (varlen.why_unsupported(call) is None) == (device == "cpu")
