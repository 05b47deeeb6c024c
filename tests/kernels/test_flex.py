"""impl="flex" on a CPU: torch's eager emulation of FlexAttention, forward only, through the same compiled function."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.attention_inputs import chain, small_tries, star
from tests.support.tolerances import Case, assert_as_exact_as_eager, exact_results, make_problem, run_eager
from tw_kernels import trie_attention
from tw_kernels.trie_attention.flex import _compiled

FORK_JOIN, NESTED, GROUP = small_tries()[5:8]
CASES = [
    Case(FORK_JOIN, heads=(4, 2)),
    Case(NESTED, heads=(3, 3), window=7),
    Case(GROUP, heads=(4, 1), softcap=1.0),
    Case(NESTED, heads=(4, 2), dims=(24, 16), sinks=True, scale=0.7),
    Case(star(150, [30, 100, 1]), heads=(2, 1), window=20, softcap=2.0, sinks=True),
]


def forward(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    problem = make_problem(case, dtype)
    trie = case.trie
    out, lse = trie_attention(
        *(problem.q, problem.k, problem.v, trie.subtree_end),
        position_ids=trie.depth,
        sinks=problem.sinks,
        impl="flex",
        return_lse=True,
        **problem.options,
    )
    return {"out": out, "lse": lse}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_flex_forward(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    got = forward(case, dtype)
    assert got["out"].dtype == dtype
    assert_as_exact_as_eager(got, run_eager(problem), exact_results(problem), dtype)


def test_lengths_windows_softcaps_and_scales_compile_nothing_new() -> None:
    torch._dynamo.reset()
    _compiled.cache_clear()

    def compilations(case: Case) -> int:
        before = counters["stats"]["unique_graphs"]
        forward(case, torch.float32)
        return counters["stats"]["unique_graphs"] - before

    def cases(n: int) -> list[Case]:
        trie = star(n, [n // 2, n // 3])
        return [
            Case(trie),
            Case(trie, window=n // 4),
            Case(trie, softcap=1.0 + n / 1000),
            Case(trie, window=n // 5, scale=1 / n),
        ]

    first = [compilations(case) for case in cases(150)]
    assert max(first) == 1
    for n in (171, 190, 333, 400):
        assert [compilations(case) for case in cases(n)] == [0, 0, 0, 0]


def test_as_many_tiles_as_heads_compile_nothing_new() -> None:
    """torch takes sizes that are equal at the first call for equal ever after: two tiles for two heads."""
    torch._dynamo.reset()
    _compiled.cache_clear()
    for heads in ((4, 2), (3, 3)):
        before = counters["stats"]["unique_graphs"]
        for n in (170, 300, 450, 600, 1000, 140):
            forward(Case(chain(n), heads=heads), torch.float32)
        assert counters["stats"]["unique_graphs"] - before == 1


def test_many_layouts_in_one_process() -> None:
    """torch.compile gives up at the ninth compilation of one function; models of other head counts are no reason to."""
    for heads in range(1, 12):
        forward(Case(GROUP, heads=(heads, 1)), torch.float32)


def test_flex_has_no_backward_on_a_cpu() -> None:
    problem = make_problem(Case(NESTED), torch.float32)
    with pytest.raises(ValueError, match=r"impl='flex' cannot run this call: q, k and v must not require a gradient"):
        trie_attention(problem.q.requires_grad_(), problem.k, problem.v, NESTED.subtree_end, impl="flex")
