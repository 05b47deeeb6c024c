"""The ops are registered as torch.library wants them, and compile once for all lengths."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.attention_inputs import random_forest, small_tries
from tests.support.tolerances import Case, make_problem
from tw_kernels import trie_attention
from tw_kernels.trie_attention import autograd  # noqa: F401  registers the ops
from tw_kernels.trie_attention.plan import make_plan

OPS = torch.ops.threadweaver


def arguments(case: Case) -> tuple[Any, ...]:
    problem = make_problem(case, torch.float32)
    trie = case.trie
    depth = trie.depth.int() if case.window else None
    plan = make_plan(trie.subtree_end, window=case.window, block=64)
    q, k, v = (x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    sinks = None if problem.sinks is None else problem.sinks.clone().requires_grad_()
    return q, k, v, sinks, trie.subtree_end, depth, plan.data, 64, 0.25, case.window, case.softcap, False, False


CASES = [Case(small_tries()[5]), Case(small_tries()[6], heads=(4, 2), window=5, softcap=3.0, sinks=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_forward(case: Case) -> None:
    torch.library.opcheck(OPS.trie_attention.default, arguments(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_backward(case: Case) -> None:
    args = arguments(case)
    o, lse = OPS.trie_attention(*args)
    tensors = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(
        OPS.trie_attention_backward.default,
        (*tensors[:7], o.detach(), lse.detach(), torch.ones_like(o), *tensors[7:]),
    )


def test_opcheck_of_the_plan() -> None:
    trie = small_tries()[5]
    torch.library.opcheck(OPS.trie_plan.default, (trie.subtree_end, None, None, 64))
    torch.library.opcheck(OPS.trie_plan.default, (trie.subtree_end, trie.depth.int(), 5, 64))


def compiled_twin(counter: CompileCounterWithBackend):
    def attend(x: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        q, k, v = x.split([2, 1, 1], dim=1)
        once = trie_attention(q * 1.5, k, v, end, impl="triton")
        return trie_attention(once, k, v, end, impl="triton") + 1

    return attend, torch.compile(attend, fullgraph=True, backend=counter)


def run_lengths(device: str, dtype: torch.dtype, lengths: int) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = compiled_twin(counter)
    for seed in range(lengths):
        trie = random_forest(seed, 17 + (seed * 7919) % 120)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(trie.num_rows, 4, 16, generator=generator).to(device, dtype).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        end = trie.subtree_end.to(device)
        out, want = compiled(x, end), plain(twin, end)
        assert torch.equal(out, want)
        if seed < 3:
            out.sum().backward()
            want.sum().backward()
            assert torch.equal(x.grad, twin.grad)
    assert counter.frame_count <= 2


def test_one_graph_for_random_lengths() -> None:
    run_lengths("cpu", torch.float32, 12)


@pytest.mark.slow
def test_one_graph_for_a_hundred_random_lengths() -> None:
    run_lengths("cpu", torch.float32, 100)


@pytest.mark.gpu
def test_one_graph_for_a_hundred_random_lengths_on_the_gpu() -> None:
    run_lengths("cuda", torch.bfloat16, 100)


@pytest.mark.gpu
def test_new_lengths_build_no_new_kernel_on_the_gpu() -> None:
    from tw_kernels.trie_attention import backward, forward

    def variants() -> list[int]:
        kernels = (forward._forward_kernel, backward._dq_kernel, backward._dkv_kernel)
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    def run(rows: int) -> None:
        trie = random_forest(rows, rows)
        problem = make_problem(Case(trie, heads=(4, 2), dims=(64, 64)), torch.bfloat16, "cuda")
        q = problem.q.requires_grad_()
        trie_attention(q, problem.k, problem.v, trie.subtree_end.cuda(), impl="triton").sum().backward()

    run(100)
    before = variants()
    for rows in (1, 2, 16, 17, 127, 128, 129, 1000, 1024, 2048):
        run(rows)
    assert variants() == before
