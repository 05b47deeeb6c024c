"""The Triton kernels over tile sizes and their edges; test_impls.py runs them through the suite of all implementations.

Without a GPU: float16 and float32 in Triton's interpreter, with small tiles, so that small tries have skipped, full and
partial tiles, several tiles a block, several blocks a program order.
"""

import pytest
import torch

from tests.support.attention_inputs import build, chain, comb, fork_at, random_forest, small_tries, star
from tests.support.tolerances import Case, check_case, make_problem, run_impl
from tw_core.errors import ShapeError
from tw_kernels import trie_attention
from tw_kernels.trie_attention import config
from tw_kernels.trie_attention.config import TileConfig, pick_config
from tw_kernels.trie_attention.plan import make_plan

RANDOM, NESTED, FORK_JOIN = random_forest(0, 150), small_tries()[6], small_tries()[5]
TILES = [(16, 16, 16), (32, 16, 32), (32, 32, 16), (64, 16, 32), (128, 32, 64)]


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch):
    """Choose the interpreter's plan block and tiles."""

    def choose(block: int, block_m: int, block_n: int, **options: bool) -> None:
        monkeypatch.setattr(config, "INTERPRETER_PLAN_BLOCK", block)
        monkeypatch.setattr(config, "_INTERPRETER", TileConfig(block_m, block_n, 1, 1, **options))

    return choose


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(random_forest(1, 75), heads=(4, 2)),
        Case(comb(6, 5, 7), heads=(2, 1), window=9),
        Case(small_tries()[7], heads=(2, 2), window=20, softcap=2.0, sinks=True),
    ],
    ids=str,
)
def test_tile_sizes(case: Case, tiles: tuple[int, int, int], tiled) -> None:
    tiled(*tiles)
    check_case(case, "triton", torch.float32)


@pytest.mark.parametrize("options", [{"head_slowest": False}, {"separate": True}, {"tma": True}], ids=str)
def test_program_orders_and_variants(options: dict[str, bool], tiled) -> None:
    tiled(32, 16, 32, **options)
    check_case(Case(RANDOM, heads=(4, 2)), "triton", torch.float16)
    check_case(Case(FORK_JOIN, heads=(2, 1), dims=(32, 16), window=11), "triton", torch.float16)


@pytest.mark.parametrize("offset", [0, 1, 7, 15, *range(24, 33)])
def test_branch_points_at_offsets_of_a_tile(offset: int, tiled) -> None:
    """A kernel elsewhere goes wrong for branches at the last offsets of a tile: here tiles of 32 rows."""
    tiled(32, 32, 32)
    check_case(Case(fork_at(32 + offset)), "triton", torch.float32, seed=offset)


@pytest.mark.parametrize("offset", [56, 57, 58, 59, 60, 61, 62, 63, 64])
def test_branch_points_at_the_end_of_a_64_row_tile(offset: int, tiled) -> None:
    tiled(64, 64, 64)
    check_case(Case(fork_at(offset)), "triton", torch.float16, seed=offset)


@pytest.mark.slow
def test_branch_points_at_every_offset(tiled) -> None:
    tiled(128, 64, 128)
    for offset in range(128):
        check_case(Case(fork_at(128 + offset)), "triton", torch.float32, seed=offset)


def test_full_tiles_carry_most_of_a_long_prefix(tiled) -> None:
    """Sizes off the tile grid, with many full tiles."""
    tiled(16, 16, 16)
    for trie in (chain(131), star(70, [17, 3, 30])):
        assert sum(len(full) for _, full in make_plan(trie.subtree_end, block=16).tiles()) >= 10
        check_case(Case(trie, heads=(2, 1)), "triton", torch.float32)


def test_negative_and_zero_scale(tiled) -> None:
    tiled(32, 32, 32)
    check_case(Case(FORK_JOIN, scale=-0.4), "triton", torch.float32)
    problem = make_problem(Case(FORK_JOIN, scale=0.0), torch.float32)
    got, want = run_impl(problem, "triton"), run_impl(problem, "reference")
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


# Hidden pairs may overflow to inf before the mask replaces them by 0; numpy says so, a GPU does not.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_large_logits(tiled) -> None:
    tiled(32, 32, 32)
    check_case(Case(RANDOM, scale=8.0), "triton", torch.float16)


def test_a_given_plan_must_fit() -> None:
    problem = make_problem(Case(FORK_JOIN), torch.float32)
    end = FORK_JOIN.subtree_end
    q, k, v = problem.q, problem.k, problem.v
    plain = trie_attention(q, k, v, end, impl="triton")
    assert torch.equal(trie_attention(q, k, v, end, impl="triton", plan=make_plan(end)), plain)
    assert torch.equal(trie_attention(q, k, v, end, impl="triton", window=9, plan=make_plan(end, window=9)),
                       trie_attention(q, k, v, end, impl="triton", window=9))  # fmt: skip
    with pytest.raises(ShapeError, match=r"plan must be for N=\d+ rows, got one for 5; call make_plan"):
        trie_attention(q, k, v, end, impl="triton", plan=make_plan(chain(5).subtree_end))
    with pytest.raises(ValueError, match=r"plan must have blocks of \d+ rows, got 16; leave out make_plan's block"):
        trie_attention(q, k, v, end, impl="triton", plan=make_plan(end, block=16))
    with pytest.raises(ValueError, match=r"plan must be for window=9, got one for window=None"):
        trie_attention(q, k, v, end, impl="triton", window=9, plan=make_plan(end))


def test_a_plan_of_inference_mode_serves_training() -> None:
    problem = make_problem(Case(FORK_JOIN), torch.float32)
    with torch.inference_mode():
        plan = make_plan(FORK_JOIN.subtree_end)
    q = problem.q.clone().requires_grad_()
    trie_attention(q, problem.k, problem.v, FORK_JOIN.subtree_end, impl="triton", plan=plan).sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_newer_setting_of_tf32_is_read(setting: str) -> None:
    """Where it is in use, torch.get_float32_matmul_precision raises."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        assert config.matmul_precision(torch.float32) == setting
        assert config.matmul_precision(torch.float16) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_a_changed_trie_is_planned_again() -> None:
    """The same tensor, written in place between two steps."""
    problem = make_problem(Case(build("two", [chain_node(150)])), torch.float32)
    end = problem.case.trie.subtree_end.clone()
    trie_attention(problem.q, problem.k, problem.v, end, impl="triton")
    end.copy_(torch.arange(1, 151))
    out = trie_attention(problem.q, problem.k, problem.v, end, impl="triton")
    want = problem.v.repeat_interleave(2, dim=1)  # each row sees itself alone
    torch.testing.assert_close(out, want)


def chain_node(length: int):
    from tests.support.attention_inputs import Node

    return Node(length)


def test_only_the_named_tensors_are_saved() -> None:
    """q, k, v, o, lse and integers: nothing of size N x N, no probabilities."""
    problem = make_problem(Case(NESTED), torch.float32)
    q = problem.q.clone().requires_grad_()
    shapes = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        shapes.append((x.dtype.is_floating_point, tuple(x.shape)))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        trie_attention(q, problem.k, problem.v, NESTED.subtree_end, impl="triton")
    n = NESTED.num_rows
    assert sorted(shape for is_float, shape in shapes if is_float) == sorted(
        [(n, 2, 16), (n, 1, 16), (n, 1, 16), (n, 2, 16), (2, n)]
    )


def test_a_second_derivative_is_refused() -> None:
    """It was zero, behind a warning that a caller may have silenced: the backward op has no derivative."""
    problem = make_problem(Case(NESTED, heads=(2, 1)), torch.float32)
    q = problem.q.clone().requires_grad_()
    out = trie_attention(q, problem.k, problem.v, NESTED.subtree_end, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_where_no_gradient_arrives_none_is_computed() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _grad):
            return None

    problem = make_problem(Case(NESTED, heads=(2, 1)), torch.float32)
    q = problem.q.clone().requires_grad_()
    Stop.apply(trie_attention(q, problem.k, problem.v, NESTED.subtree_end, impl="triton")).sum().backward()
    assert q.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_the_backward_is_bitwise_repeatable(dims: tuple[int, int]) -> None:
    problem = make_problem(
        Case(random_forest(2, 1500, mean_length=40), heads=(8, 2), dims=dims), torch.bfloat16, "cuda"
    )
    first = run_impl(problem, "triton", deterministic=True)
    for _ in range(9):
        again = run_impl(problem, "triton", deterministic=True)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_the_table_has_tiles_for_every_head(capability: tuple[int, int]) -> None:
    for dim in range(1, 257):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for kernel in ("forward", "dq", "dkv"):
                tiles = pick_config(dim, 16, dtype, capability, kernel)
                assert config.PLAN_BLOCK % tiles.block_m == 0
                assert config.PLAN_BLOCK % tiles.block_n == 0
                assert tiles == pick_config(16, dim, dtype, capability, kernel)
    with pytest.raises(ValueError, match="head dimensions must be at most 256, got D=257"):
        pick_config(257, 16, torch.float16, capability, "forward")
