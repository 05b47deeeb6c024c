"""The oracle itself, against plain softmax attention over each sequence of the trie, one by one."""

import pytest
import torch
from torch import Tensor

from tests.support.attention_inputs import TrieShape, comb, random_forest, small_tries
from tests.support.tolerances import Case, differentiate, make_problem, run_impl
from tw_core.errors import TrieError
from tw_kernels import trie_attention

OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "window_1": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 7, "softcap": 2.0, "sinks": True, "scale": 0.4, "dims": (8, 12)},
}


def attend_one_query(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last row's output (H, Dv) and lse (H,) over the rows of one sequence prefix, in the plainest words."""
    if case.window is not None:
        k, v = k[-case.window :], v[-case.window :]
    outs, lses = [], []
    for head in range(q.shape[0]):
        kv_head = head * k.shape[1] // q.shape[0]
        scale = q.shape[1] ** -0.5 if case.scale is None else case.scale
        logits = (k[:, kv_head] @ q[head]) * scale
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        if sinks is not None:
            logits = torch.cat([logits, sinks[head : head + 1]])
        weights = logits.softmax(0)[: len(k)]
        outs.append(weights @ v[:, kv_head])
        lses.append(logits.logsumexp(0))
    return torch.stack(outs), torch.stack(lses)


def one_by_one(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every row of every sequence on its own; each trie row is taken from the first sequence that holds it."""
    outs: dict[int, Tensor] = {}
    lses: dict[int, Tensor] = {}
    for i in range(len(case.trie.last_rows)):
        rows = case.trie.sequence_rows(i)
        for length, row in enumerate(rows.tolist(), start=1):
            if row not in outs:
                path = rows[:length]
                outs[row], lses[row] = attend_one_query(case, q[row], k[path], v[path], sinks)
    n = case.trie.num_rows
    return torch.stack([outs[row] for row in range(n)]), torch.stack([lses[row] for row in range(n)], dim=1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("trie", [*small_tries()[1:9:2], comb(4, 2, 3), random_forest(7, 60)], ids=str)
def test_reference_equals_the_sequences_one_by_one(trie: TrieShape, options: dict) -> None:
    case = Case(trie, **({"heads": (4, 2), "dims": (8, 8)} | options))
    problem = make_problem(case, torch.float64)
    got = run_impl(problem, "reference")
    want = differentiate(lambda q, k, v, sinks: one_by_one(case, q, k, v, sinks), problem)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_row_of_another_sequence_has_no_influence() -> None:
    """The product of this library in one line: a sibling's keys and values do not matter, an ancestor's do."""
    trie = small_tries()[3]  # a prompt of 37 rows and branches of 20, 1, 33 and 12
    problem = make_problem(Case(trie), torch.float64)
    before = trie_attention(problem.q, problem.k, problem.v, trie.subtree_end, impl="reference")
    changed = problem.v.clone()
    changed[40] += 1.0
    after = trie_attention(problem.q, problem.k, changed, trie.subtree_end, impl="reference")
    moved = torch.nonzero((before - after).abs().amax((1, 2)))[:, 0]
    assert moved.tolist() == list(range(40, 57))


def test_gradcheck() -> None:
    trie = random_forest(3, 12, mean_length=2.0)
    problem = make_problem(Case(trie, heads=(2, 1), dims=(3, 2), sinks=True), torch.float64)
    inputs = [x.requires_grad_() for x in (problem.q, problem.k, problem.v, problem.sinks)]

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return trie_attention(q, k, v, trie.subtree_end, sinks=sinks, softcap=2.0, window=3, impl="reference")

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(
    ("subtree_end", "match"),
    [
        ([3, 3, 3, 3], r"subtree_end\[3\] must lie in 4\.\.4, got 3; take subtree_end from PackedTrie"),
        ([4, 1, 4, 4], r"subtree_end\[1\] must lie in 2\.\.4, got 1"),
        ([4, 5, 4, 4], r"subtree_end\[1\] must lie in 2\.\.4, got 5"),
        ([2, 4, 4, 4], r"must be that of a forest in preorder, but the subtree of row 0, which ends at 2, crosses"),
        ([4, 3, 4, 4], r"must be that of a forest in preorder, but the subtree of row 1, which ends at 3, crosses"),
    ],
)
def test_reference_refuses_what_is_not_a_forest(subtree_end: list[int], match: str) -> None:
    x = torch.zeros(4, 1, 2)
    with pytest.raises(TrieError, match=match):
        trie_attention(x, x, x, torch.tensor(subtree_end, dtype=torch.int32), impl="reference")


def test_reference_refuses_depths_that_jump() -> None:
    x = torch.zeros(4, 1, 2)
    end = torch.tensor([4, 3, 3, 4], dtype=torch.int32)
    ok = torch.tensor([5, 6, 7, 6])  # positions may start anywhere
    trie_attention(x, x, x, end, position_ids=ok, window=2, impl="reference")
    match = r"position_ids must rise by one from parent to child, but position_ids\[3\] is 8 where 6 was expected"
    with pytest.raises(TrieError, match=match):
        trie_attention(x, x, x, end, position_ids=torch.tensor([5, 6, 7, 8]), window=2, impl="reference")
