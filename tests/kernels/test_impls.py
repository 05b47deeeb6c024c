"""One suite for every implementation: the same tries, the same options, one rule (tests/support/tolerances.py).

On a CPU Triton runs in its interpreter, in float16 and float32. `make test-gpu` runs the same functions on the GPU, in
bfloat16 and float16. Flex has no backward on a CPU: test_flex.py checks its forward there.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.support.attention_inputs import (
    TrieShape,
    build,
    chain,
    comb,
    empty,
    every_offset,
    fork_at,
    random_forest,
    sft_3k,
    small_tries,
    star,
)
from tests.support.tolerances import (
    Case,
    assert_as_exact_as_eager,
    check_case,
    exact_results,
    make_problem,
    run_eager,
    run_impl,
)
from tw_kernels import trie_attention

CPU_RUNS = [("triton", torch.float16), ("dense", torch.float32), ("dense", torch.float16)]
CPU_RUNS += [("varlen", torch.float32), ("varlen", torch.bfloat16), ("reference", torch.float16)]
GPU_RUNS = [(impl, torch.bfloat16) for impl in ("triton", "flex", "varlen", "dense")] + [("triton", torch.float16)]
CANNOT = {"dense": {"softcap", "sinks"}, "varlen": {"softcap", "sinks"}}

FORK_JOIN, NESTED, GROUP, RANDOM = small_tries()[5], small_tries()[6], small_tries()[7], small_tries()[9]
SHAPES = [Case(trie, heads=(4, 2)) for trie in [*small_tries(), every_offset()]]
LAYOUTS = [
    Case(FORK_JOIN, heads=(3, 3)),
    Case(FORK_JOIN, heads=(6, 1)),
    Case(NESTED, heads=(8, 2), dims=(32, 32)),
    Case(GROUP, heads=(2, 1), dims=(64, 64)),
    Case(GROUP, heads=(1, 1), dims=(80, 80)),
    Case(FORK_JOIN, heads=(2, 2), dims=(96, 96)),
    Case(RANDOM, heads=(2, 1), dims=(128, 128)),
    Case(star(37, [20, 1, 33, 12]), heads=(2, 1), dims=(256, 256)),
    Case(FORK_JOIN, heads=(2, 1), dims=(192, 128)),
    Case(FORK_JOIN, heads=(2, 1), dims=(16, 48)),
]
OPTIONS = [
    Case(NESTED, scale=0.5),
    Case(FORK_JOIN, window=1),
    Case(NESTED, window=7),
    Case(GROUP, heads=(4, 2), window=32),
    Case(RANDOM, window=1000),
    Case(comb(40, 3, 2), window=16),
    Case(NESTED, softcap=1.0),
    Case(GROUP, heads=(4, 2), sinks=True),
    Case(FORK_JOIN, heads=(4, 2), window=9, softcap=2.0, sinks=True, scale=0.3),
]


def features(case: Case) -> set[str]:
    return {name for name in ("softcap", "sinks") if getattr(case, name)}


def every_run(cases: list[Case]) -> list:
    """(case, impl, dtype, device) for each implementation that takes the case."""
    rows = [(case, *run, "cpu", ()) for run in CPU_RUNS for case in cases]
    rows += [(case, *run, "cuda", pytest.mark.gpu) for run in GPU_RUNS for case in cases]
    return [
        pytest.param(case, impl, dtype, device, marks=marks, id=f"{impl}-{str(dtype)[6:]}-{device}-{case}")
        for case, impl, dtype, device, marks in rows
        if not features(case) & CANNOT.get(impl, set())
    ]


def gpu_impls(*names: str) -> list:
    """(impl, device) pairs: on the CPU as they are, on the GPU marked so."""
    return [pytest.param(name, "cpu", id=f"{name}-cpu") for name in names] + [
        pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda") for name in (*names, "flex")
    ]


@pytest.mark.parametrize(("case", "impl", "dtype", "device"), every_run(SHAPES))
def test_every_trie(case: Case, impl: str, dtype: torch.dtype, device: str) -> None:
    check_case(case, impl, dtype, device)


@pytest.mark.parametrize(("case", "impl", "dtype", "device"), every_run(LAYOUTS))
def test_heads_and_dims(case: Case, impl: str, dtype: torch.dtype, device: str) -> None:
    check_case(case, impl, dtype, device)


@pytest.mark.parametrize(("case", "impl", "dtype", "device"), every_run(OPTIONS))
def test_options(case: Case, impl: str, dtype: torch.dtype, device: str) -> None:
    check_case(case, impl, dtype, device)


@pytest.mark.parametrize("impl", ["triton", "dense", "varlen"])
def test_float32_and_float64(impl: str) -> None:
    check_case(Case(NESTED, heads=(4, 2)), impl, torch.float32)
    if impl != "triton":
        check_case(Case(NESTED, heads=(4, 2), window=6), impl, torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "flex"])
def test_float32_on_the_gpu_uses_no_tf32(impl: str) -> None:
    check_case(Case(NESTED, heads=(4, 2), dims=(64, 64)), impl, torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "flex", "varlen", "dense"])
def test_branch_points_at_every_offset_of_a_tile(impl: str) -> None:
    """A kernel elsewhere is wrong when a branch starts at offset 57..63 of its tile: so each offset on its own."""
    for offset in range(128):
        check_case(Case(fork_at(128 + offset), heads=(2, 1), dims=(64, 64)), impl, torch.bfloat16, "cuda", seed=offset)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "flex", "varlen"])
def test_random_forests_on_the_gpu(impl: str) -> None:
    for seed in range(20):
        trie = random_forest(seed, 300 + 61 * seed, mean_length=1 + 4.0 * (seed % 5))
        options = {"window": 1 + 17 * (seed % 4)} if seed % 2 else {}
        check_case(Case(trie, heads=(4, 2), dims=(64, 64), **options), impl, torch.bfloat16, "cuda", seed=seed)


@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "varlen", "reference"))
def test_no_rows(impl: str, device: str) -> None:
    problem = make_problem(Case(empty(), sinks=impl == "triton"), torch.float16, device)
    results = run_impl(problem, impl)
    assert results["out"].shape == (0, 2, 16)
    assert results["lse"].shape == (2, 0)
    assert results["dk"].shape == (0, 1, 16)
    if "dsinks" in results:
        assert results["dsinks"].tolist() == [0, 0]


@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "varlen"))
def test_any_strides_with_a_contiguous_last_dimension(impl: str, device: str) -> None:
    """q, k and v as models make them: slices of one fused projection, or (H, N, D) transposed.

    Our kernels read the same numbers in the same order. Inductor compiles flex anew for other strides, and may add up
    (dO . O) in another order: there the rule of tolerances.py holds.
    """
    dtype = torch.float16
    problem = make_problem(Case(FORK_JOIN, heads=(4, 2)), dtype, device)
    n, d = problem.q.shape[0], problem.q.shape[2]
    fused = torch.cat([problem.q, problem.k, problem.v], dim=1).reshape(n, -1).requires_grad_()
    q, k, v = (x.unflatten(1, (-1, d)) for x in fused.split([4 * d, 2 * d, 2 * d], dim=1))
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    end = problem.case.trie.subtree_end.to(device)
    out = trie_attention(q, k, v, end, impl=impl)
    grad_out = problem.grad_out.transpose(0, 1).contiguous().transpose(0, 1)
    out.backward(grad_out)
    grads = fused.grad.unflatten(1, (-1, d)).split([4, 2, 2], dim=1)
    got = {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    if impl == "flex":
        assert_as_exact_as_eager(got, run_eager(problem), exact_results(problem), dtype)
        return
    plain = run_impl(problem, impl)
    for name, value in got.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "varlen"))
def test_an_expanded_output_gradient(impl: str, device: str) -> None:
    """out.sum().backward() sends a gradient of stride 0."""
    problem = make_problem(Case(GROUP), torch.float16, device)
    q = problem.q.clone().requires_grad_()
    end = problem.case.trie.subtree_end.to(device)
    trie_attention(q, problem.k, problem.v, end, impl=impl).sum().backward()
    again = problem.q.clone().requires_grad_()
    out = trie_attention(again, problem.k, problem.v, end, impl=impl)
    out.backward(torch.ones_like(out))
    assert torch.equal(q.grad, again.grad)


@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "varlen"))
def test_autocast_casts_like_sdpa(impl: str, device: str) -> None:
    problem = make_problem(Case(GROUP), torch.float32, device)
    dtype = torch.float16 if impl == "triton" else torch.bfloat16
    end = problem.case.trie.subtree_end.to(device)
    q, k = (x.clone().requires_grad_() for x in (problem.q, problem.k))
    with torch.autocast(device, dtype=dtype):
        out = trie_attention(q, k, problem.v.to(dtype), end, impl=impl)  # mixed, as after rotary embeddings in float32
    assert out.dtype == dtype
    out.backward(problem.grad_out.to(dtype))
    assert q.grad.dtype == torch.float32
    plain = trie_attention(q.to(dtype), k.to(dtype), problem.v.to(dtype), end, impl=impl)
    assert torch.equal(out, plain)


@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "varlen"))
def test_inference_mode_and_training_afterwards(impl: str, device: str) -> None:
    """What is remembered from a pass in inference_mode must serve a training pass: masks built there once did not."""
    problem = make_problem(Case(GROUP, window=9), torch.float16, device)
    end = problem.case.trie.subtree_end.to(device)
    with torch.inference_mode():
        before = trie_attention(problem.q, problem.k, problem.v, end, window=9, impl=impl)
    q = problem.q.clone().requires_grad_()
    out = trie_attention(q, problem.k, problem.v, end, window=9, impl=impl)
    out.backward(problem.grad_out)
    assert torch.equal(out, before)
    assert q.grad.isfinite().all()
    with torch.inference_mode():  # and with tensors that were born there
        inside = end.clone()
        assert torch.equal(trie_attention(problem.q, problem.k, problem.v, inside, window=9, impl=impl), before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "varlen"))
def test_activation_checkpointing(impl: str, device: str, reentrant: bool) -> None:
    """Bitwise for our kernels; flex is compiled anew where q alone has a gradient, see the strides above."""
    problem = make_problem(Case(NESTED), torch.float16, device)
    end = problem.case.trie.subtree_end.to(device)
    q = problem.q.clone().requires_grad_()
    args = (q, problem.k, problem.v, end)
    out = (
        checkpoint(trie_attention, *args, impl=impl, use_reentrant=False)
        if not reentrant
        else (checkpoint(lambda *a: trie_attention(*a, impl=impl), *args, use_reentrant=True))
    )
    out.backward(problem.grad_out)
    got = {"out": out.detach(), "dq": q.grad}
    if impl == "flex":
        assert_as_exact_as_eager(got, run_eager(problem), exact_results(problem), torch.float16)
        return
    plain = run_impl(problem, impl)
    for name, value in got.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "varlen"))
def test_rows_after_the_trie_are_padding(impl: str, device: str) -> None:
    """Padding rows are roots of their own: the trie's numbers do not move, theirs are finite."""
    trie = FORK_JOIN
    padded = build("padded", [])
    n, extra = trie.num_rows, 19
    padded = TrieShape(
        "padded",
        torch.cat([trie.subtree_end, torch.arange(n + 1, n + extra + 1, dtype=torch.int32)]),
        torch.cat([trie.depth, torch.zeros(extra, dtype=torch.int64)]),
        trie.last_rows,
    )
    problem = make_problem(Case(padded), torch.float16, device)
    problem.grad_out[n:] = 0
    results = run_impl(problem, impl)
    alone = make_problem(Case(padded), torch.float16, device)
    cut = type(problem)(Case(trie), problem.q[:n], problem.k[:n], problem.v[:n], None, alone.grad_out[:n])
    want = run_impl(cut, impl)
    for name in ("out", "dq", "dk", "dv"):
        assert results[name].isfinite().all()
    small = {name: x[:n] for name, x in results.items() if name != "lse"}
    assert_as_exact_as_eager(
        small, {name: want[name] for name in small}, {k: v.double() for k, v in want.items()}, torch.float16
    )
    for name in ("dq", "dk", "dv"):
        assert torch.count_nonzero(results[name][n:]) == 0
    assert results["lse"].isfinite().all()


class Attend(torch.nn.Module):
    """A module whose forward is one projection and one call."""

    def __init__(self, impl: str, window: int | None = None) -> None:
        super().__init__()
        self.impl, self.window = impl, window

    def forward(self, x: torch.Tensor, end: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        q, k, v = x.split([2, 1, 1], dim=1)
        return trie_attention(q * 1.5, k, v, end, position_ids=position_ids, window=self.window, impl=self.impl) + 1


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "auto")[:-1])
def test_torch_compile_has_one_graph_for_all_lengths(impl: str, device: str, window: int | None) -> None:
    """No graph break, and at most two compilations over many lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = Attend(impl, window)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    dtype = torch.float16
    for seed in range(6 if device == "cpu" else 100):
        trie = random_forest(seed, 20 + 7 * seed)
        x = torch.randn(trie.num_rows, 4, 16, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        args = (trie.subtree_end.to(device), trie.depth.to(device))
        leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = compiled(leaf, *args)
        want = module(twin, *args)
        assert torch.equal(out, want)
        if seed < 2:
            out.sum().backward()
            want.sum().backward()
            torch.testing.assert_close(leaf.grad, twin.grad)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("impl", "device"), gpu_impls("triton", "dense", "auto")[:-1])
def test_torch_compile_takes_a_scale_that_is_symbolic(impl: str, device: str) -> None:
    """`layer.compile(dynamic=True)` traces a module's float attributes, as the scale of an attention layer is."""

    class Layer(torch.nn.Module):
        scaling = 0.3

        def forward(self, q: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
            return trie_attention(q, q, q, end, scale=self.scaling, impl=impl)

    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in range(3):
        trie = random_forest(seed, 20 + 7 * seed)
        q, end = torch.randn(trie.num_rows, 2, 16).half().to(device), trie.subtree_end.to(device)
        assert torch.equal(compiled(q, end), layer(q, end))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "flex"])
def test_many_lengths_compile_nothing_new(impl: str) -> None:
    """100 new lengths after the first two calls: the time of the slowest stays far below a compilation."""
    import time

    slowest = 0.0
    for seed in range(102):
        trie = chain(200 + 37 * seed) if seed % 2 else star(100 + seed, [20 + seed, 50])
        problem = make_problem(Case(trie, heads=(4, 2), dims=(64, 64)), torch.bfloat16, "cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        run_impl(problem, impl)
        torch.cuda.synchronize()
        if seed >= 2:
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.5


@pytest.mark.gpu
def test_64k_rows_against_flex_and_a_chunked_reference() -> None:
    """The size where 32-bit offsets overflow (rows x heads x dim > 2^31 / 8), in bfloat16."""
    from tests.support.attention_inputs import sft_64k
    from tests.support.tolerances import chunked_rows

    case = Case(sft_64k(), heads=(32, 8), dims=(128, 128))
    problem = make_problem(case, torch.bfloat16, "cuda")
    ours, flex = run_impl(problem, "triton"), run_impl(problem, "flex")
    for name, want in flex.items():
        scale = want.double().abs().max()
        assert (ours[name].double() - want.double()).abs().max() <= 2**-6 * scale, name
    rows = torch.linspace(0, case.trie.num_rows - 1, 257).long()
    out, lse = chunked_rows(problem, rows)
    eps = torch.finfo(torch.bfloat16).eps
    assert (ours["out"][rows.cuda()].double() - out).abs().max() <= 2 * eps * out.abs().max()
    assert (ours["lse"][:, rows.cuda()].double() - lse).abs().max() <= 1e-4 * lse.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "flex", "varlen"])
def test_a_whole_trajectory_of_3k_rows(impl: str) -> None:
    check_case(Case(sft_3k(), heads=(8, 2), dims=(128, 128)), impl, torch.bfloat16, "cuda")
