"""The Hopper kernels: emulated on a CPU (arithmetic, barriers, who is chosen when), and as they are on a GPU.

The GPU half is test_impls.py's suite at the head dimensions that the kernels take.
"""

import contextlib
import dataclasses
import functools
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support import gluon_emulator
from tests.support.attention_inputs import (
    TrieShape,
    chain,
    every_offset,
    fork_at,
    random_forest,
    sft_3k,
    sft_64k,
    small_tries,
    star,
)
from tests.support.gluon_emulator import Barrier, Deadlock, Emulator, Product, Shared
from tests.support.tolerances import (
    Case,
    Problem,
    assert_as_exact_as_eager,
    cancelling_terms,
    check_case,
    chunked_rows,
    exact_results,
    make_problem,
    nan_poison,
    run_eager,
    run_impl,
)
from tw_kernels import AttentionCall, choose_impl, make_plan, trie_attention
from tw_kernels.trie_attention import backward as portable
from tw_kernels.trie_attention.hopper import backward, launch, support

# ---------------------------------------------------------------------------------------------------- emulated, CPU


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_forward_kernel", Emulator(launch._forward_kernel))
    monkeypatch.setattr(launch, "_dkv_kernel", Emulator(launch._dkv_kernel))
    monkeypatch.setattr(launch, "_wide_dkv_kernel", Emulator(launch._wide_dkv_kernel))
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 3)


def compare(problem: Problem, q: Tensor, k: Tensor, v: Tensor, end: Tensor, grad_out: Tensor, **options: Any) -> None:
    """Both launchers on layouts of the problem's own numbers, by the tolerances' rule."""
    plan, scale = make_plan(end, block=128), problem.case.dims[0] ** -0.5
    with nan_poison():
        out, lse = launch.launch_forward(q, k, v, end, plan, scale=scale)
        dq, dk, dv = launch.launch_backward(q, k, v, end, plan, out, lse, grad_out, scale=scale, **options)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    exact = exact_results(problem)
    assert_as_exact_as_eager(got, run_eager(problem), exact, problem.q.dtype, cancelling_terms(problem))


EMULATED = [
    Case(chain(1), heads=(1, 1), dims=(64, 64)),
    Case(chain(300), heads=(2, 1), dims=(128, 128)),
    Case(star(137, [70, 1, 33]), heads=(4, 2), dims=(64, 64)),
    Case(random_forest(1, 380, mean_length=20.0), heads=(3, 1), dims=(64, 64)),
]


# Two tiles a block, o in the place of q, dk and dv apart; columns in three tiles, and that place wider than o.
WIDE = [
    Case(chain(1), heads=(1, 1), dims=(256, 256)),
    Case(star(137, [70, 1, 33]), heads=(4, 2), dims=(256, 256)),
    Case(random_forest(1, 380, mean_length=20.0), heads=(3, 1), dims=(256, 256)),
    Case(chain(1), heads=(1, 1), dims=(192, 128)),
    Case(star(137, [70, 1, 33]), heads=(4, 2), dims=(192, 128)),
    Case(random_forest(1, 380, mean_length=20.0), heads=(3, 1), dims=(192, 128)),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_emulated_wide_heads(case: Case, emulated: None) -> None:
    problem = make_problem(case, torch.float16)
    end = case.trie.subtree_end
    compare(problem, problem.q, problem.k, problem.v, end, problem.grad_out, deterministic=False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_emulated(case: Case, deterministic: bool, emulated: None) -> None:
    problem = make_problem(case, torch.float16)
    end = case.trie.subtree_end
    compare(problem, problem.q, problem.k, problem.v, end, problem.grad_out, deterministic=deterministic)


def test_layouts_that_tma_can_and_cannot_describe(emulated: None) -> None:
    """Heads first, slices of a fused projection, an odd start and an expanded gradient give the same numbers."""
    case = Case(star(60, [50, 40]), heads=(2, 1), dims=(64, 64))
    problem = make_problem(case, torch.float16)
    n, end = case.trie.num_rows, case.trie.subtree_end
    q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([problem.q, problem.k, problem.v], dim=1).reshape(n, -1)
    _, k, v = (x.unflatten(1, (-1, 64)) for x in fused.split([128, 64, 64], dim=1))
    assert launch.describable(q) is q
    assert launch.describable(k) is k
    odd = torch.cat([problem.k.flatten(), problem.k.flatten()])[1:]
    odd = odd[: problem.k.numel()].view_as(problem.k).copy_(problem.k)
    assert launch.describable(odd) is not odd
    shifted = torch.cat([end[:1], end])[1:]
    assert shifted.data_ptr() % 16
    compare(problem, q, k, v, shifted, problem.grad_out, deterministic=False)
    compare(problem, problem.q, odd, v, end, problem.grad_out, deterministic=False)
    ones = dataclasses.replace(problem, grad_out=torch.ones_like(problem.grad_out))
    compare(ones, q, k, v, end, torch.ones((), dtype=q.dtype).expand(q.shape), deterministic=False)


@pytest.mark.parametrize(("shape", "strides", "takes"), [
    ((9, 2, 64), (128, 64, 1), True),
    ((9, 2, 64), (64, 576, 1), True),  # heads first
    ((9, 2, 64), (132, 64, 1), False),  # 264 bytes
    ((9, 2, 64), (64, 0, 1), False),  # one head expanded
    ((9, 2, 64), (0, 64, 1), False),  # one row expanded
    ((9, 2, 64), (0, 0, 0), False),
    ((9, 1, 64), (64, 0, 1), True),  # a dimension of one entry has no step
    ((1, 2, 64), (3, 64, 1), True),
])  # fmt: skip
def test_what_tma_can_address(shape: tuple[int, ...], strides: tuple[int, ...], takes: bool) -> None:
    """One rule for both backwards: a step of 0 went to TMA in the portable one, and was copied in the other."""
    x = torch.zeros(4096, dtype=torch.float16).as_strided(shape, strides)
    assert portable.tma_addressable(x) == takes
    assert (launch.describable(x) is x) == takes
    packed = shape[1] == 1 or strides[1] == shape[2]
    assert portable._describable(x) == (takes and packed and shape[0] > 1)
    assert not portable.tma_addressable(torch.zeros(4096, dtype=torch.float16)[1:].as_strided(shape, strides, 1))


def test_every_block_of_every_head_has_one_program() -> None:
    """The longest of all heads first, then heads from left to right, the last head by length."""
    emulator = Emulator(backward._dkv_kernel)
    item = emulator.translate(backward._item)
    for blocks, heads, longest in [(1, 1, 0), (7, 3, 2), (9, 2, 9), (40, 1, 32), (33, 5, 13)]:
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks)).int()
        rest = order[longest:].tolist()
        want = [(head, block) for block in order[:longest].tolist() for head in range(heads)]
        want += [(head, block) for head in range(heads) for block in (sorted(rest) if head < heads - 1 else rest)]
        got = []
        for program in range(blocks * heads):
            emulator.program = (program, blocks * heads)
            sizes = (torch.tensor(x, dtype=torch.int32) for x in (blocks, heads, longest))
            got.append(tuple(map(int, item(gluon_emulator.Pointer(order), *sizes))))
        assert got == want


def test_the_emulator_sees_what_is_early_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.05)
    bar = Barrier()
    bar.init(2)
    bar.wait(1)  # a fresh barrier lets parity 1 pass
    bar.update(arrivals=1, more_bytes=8)
    bar.update(arrivals=1)
    with pytest.raises(Deadlock, match="0 arrivals and 8 bytes are missing"):
        bar.wait(0)
    bar.update(more_bytes=-8)
    bar.wait(0)
    a, b = Shared(torch.ones(2, 2)), Shared(torch.ones(2, 2))
    product = Product(a, b, None, False)
    b.store(torch.zeros(2, 2))  # too early: the product has not been waited for
    product.run()
    assert torch.equal(product.value, torch.zeros(2, 2))


# ------------------------------------------------------------------------------------------------- the rule, CPU


def gpu_call(**changes: Any) -> Any:
    """A call that looks as if it came from an H100."""
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(9, 2, 128))
    options = {"window": None, "softcap": None, "sinks": None, "plan": None, "deterministic": False}
    return SimpleNamespace(**{"q": x, "v": x} | options | changes)


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_chip_reason", lambda device: None)
    support._compile_reasons.clear()
    support._warn_once.cache_clear()
    yield
    support._compile_reasons.clear()
    support._warn_once.cache_clear()


def shaped(dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(9, 2, dim))


DIMS_RULE = "(D, Dv) must be one of (64, 64), (128, 128), (192, 128), (256, 256)"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"q": shaped(torch.float16, 64), "v": shaped(torch.float16, 64)}, None),
        ({"q": shaped(torch.float32)}, "q must be float16 or bfloat16, got torch.float32"),
        ({"window": 4}, "window must be None"),
        ({"softcap": 4.0}, "softcap must be None"),
        ({"sinks": torch.zeros(2)}, "sinks must be None"),
        ({"q": shaped(dim=192)}, None),
        ({"q": shaped(dim=256), "v": shaped(dim=256)}, None),
        ({"q": shaped(dim=256)}, f"{DIMS_RULE}, got (256, 128)"),
        ({"v": shaped(dim=64)}, f"{DIMS_RULE}, got (128, 64)"),
        (
            {"plan": SimpleNamespace(block=64)},
            r"plan must have blocks of 128 rows, got 64; call make_plan(subtree_end)",
        ),
    ],
)
def test_what_the_kernels_take(
    changes: dict[str, Any], reason: str | None, on_sm_90: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "try_one_row", lambda *asked: None)
    assert support.why_unsupported(gpu_call(**changes)) == reason


def test_a_triton_that_does_not_compile_them_warns_once(on_sm_90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*asked: Any) -> None:
        raise RuntimeError("async_load\n has been removed")

    monkeypatch.setattr(launch, "try_one_row", fail)
    with pytest.warns(
        RuntimeWarning, match=r"do not compile here .*: RuntimeError: async_load has been removed; impl='auto' uses"
    ):
        assert support.why_unsupported(gpu_call()) == "RuntimeError: async_load has been removed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert support.why_unsupported(gpu_call()) == "RuntimeError: async_load has been removed"
        # What keeps the forward from compiling keeps both backwards: no second warning.
        assert support.why_unsupported(gpu_call(deterministic=True)) == "RuntimeError: async_load has been removed"


def test_a_backward_is_tried_when_a_call_first_asks_for_it(on_sm_90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail_one(_: torch.device, dim: int, value_dim: int, dtype: torch.dtype, deterministic: bool) -> None:
        tried.append((dim, value_dim, deterministic))
        if deterministic:
            raise RuntimeError("too many registers")

    monkeypatch.setattr(launch, "try_one_row", fail_one)
    for _ in range(2):
        assert support.why_unsupported(gpu_call()) is None
    assert tried == [(128, 128, False)]
    with pytest.warns(RuntimeWarning, match="too many registers"):
        assert support.why_unsupported(gpu_call(deterministic=True)) == "RuntimeError: too many registers"
    assert support.why_unsupported(gpu_call(deterministic=True)) == "RuntimeError: too many registers"
    assert support.why_unsupported(gpu_call()) is None
    assert tried == [(128, 128, False), (128, 128, True)]


DEVICE = torch.device("cuda", 1)


class Probe:
    """try_one_row on a CPU: its kernels note who launches them, on which stream and thread; `failing` ones raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        self.launched: set[tuple[str, Any]] = set()
        self.threads: set[int] = set()
        self.devices: set[Any] = set()
        self.stream = threading.local()
        choices = {"_forward_kernel": "KEYS", "_dkv_kernel": "WITH_DQ", "_wide_dkv_kernel": "WITH_DK"}
        for name in [*choices, "before_kernel", "after_kernel"]:
            run = functools.partial(self.run, name, choices.get(name, "D"), name == failing)
            monkeypatch.setattr(launch, name, defaultdict(lambda run=run: run))
        for make in (torch.zeros, torch.ones):
            monkeypatch.setattr(torch, make.__name__, functools.partial(self.on_cpu, make))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.devices.add(device) or "the caller's")
        monkeypatch.setattr(torch.cuda, "stream", self.on_stream)
        monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
        monkeypatch.setattr(launch, "triton", MagicMock())  # whose driver wants a GPU

    def on_cpu(self, make: Any, *sizes: Any, device: Any = None, **rest: Any) -> Tensor:
        if device is not None:  # launchers allocate on the device of what the probe made
            self.devices.add(device)
        return make(*sizes, **rest)

    def run(self, name: str, choice: str, fails: bool, *args: Any, **constants: Any) -> None:
        assert self.stream.current == "the caller's"
        self.launched.add((name, constants[choice]))
        self.threads.add(threading.get_ident())
        if fails:
            raise RuntimeError(f"{name} has too many registers")

    @contextlib.contextmanager
    def on_stream(self, stream: str) -> Iterator[None]:
        self.stream.current = stream
        yield


@pytest.mark.parametrize(
    ("dims", "deterministic", "backward_kernels"),
    [
        ((128, 128), False, {("_dkv_kernel", True), ("after_kernel", 128)}),
        ((128, 128), True, {("_dkv_kernel", False)}),
        ((256, 256), False, {("_wide_dkv_kernel", True), ("_wide_dkv_kernel", False)}),
        ((192, 128), True, {("_wide_dkv_kernel", True)}),
    ],
)
def test_the_probe_compiles_what_the_call_needs_and_no_more(
    dims: tuple[int, int], deterministic: bool, backward_kernels: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(monkeypatch)
    launch.try_one_row(DEVICE, *dims, torch.bfloat16, deterministic)
    keys = launch.FORWARD_TILES[dims]["KEYS"]
    assert probe.launched == {("_forward_kernel", keys), ("before_kernel", dims[1])} | backward_kernels
    assert threading.get_ident() not in probe.threads


def test_the_probe_asks_the_device_of_q(on_sm_90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ran on the current device, and one answer served all."""
    probe, asked = Probe(monkeypatch), []
    launch.try_one_row(DEVICE, 128, 128, torch.bfloat16, False)
    assert probe.devices - {torch.device("cpu")} == {DEVICE}
    monkeypatch.setattr(launch, "try_one_row", lambda device, *_: asked.append(device))
    for index in (1, 0, 1):
        x = SimpleNamespace(device=torch.device("cuda", index), dtype=torch.bfloat16, shape=(9, 2, 128))
        assert support.why_unsupported(gpu_call(q=x, v=x)) is None
    assert asked == [torch.device("cuda", 1), torch.device("cuda", 0)]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")],
    ids=type,
)
def test_a_probe_without_memory_is_tried_again(
    error: Exception, on_sm_90: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for a Triton that cannot compile the kernels, for the rest of the process."""

    def fail(*asked: Any) -> None:
        raise error

    monkeypatch.setattr(launch, "try_one_row", fail)
    with pytest.raises(type(error), match="out of memory"):
        support.why_unsupported(gpu_call())
    monkeypatch.setattr(launch, "try_one_row", lambda *asked: None)
    assert support.why_unsupported(gpu_call()) is None


def test_threads_that_ask_at_once_are_answered_by_one_probe(on_sm_90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, start = [], threading.Barrier(3, timeout=10)

    def slow(*shape: Any) -> None:
        asked.append(shape)
        time.sleep(0.2)

    def ask() -> str | None:
        start.wait()
        return support.why_unsupported(gpu_call())

    monkeypatch.setattr(launch, "try_one_row", slow)
    with ThreadPoolExecutor(3) as pool:
        answers = [future.result() for future in [pool.submit(ask) for _ in range(3)]]
    assert answers == [None] * 3
    assert len(asked) == 1


def test_the_plan_of_one_row() -> None:
    end = torch.ones(1, dtype=torch.int32)
    plan = launch.plan_of_one_row(end)
    made = make_plan(end, block=support.BLOCK)
    assert torch.equal(plan.data, made.data)
    assert (plan.num_rows, plan.block, plan.window) == (made.num_rows, made.block, made.window)


def test_the_probe_compiles_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, main backward and the kernels around it wait for each other, which one thread could not."""
    probe, together = Probe(monkeypatch), threading.Barrier(4, timeout=10)
    run = probe.run
    choices = {"_forward_kernel": "KEYS", "_dkv_kernel": "WITH_DQ", "before_kernel": "D", "after_kernel": "D"}
    for name, choice in choices.items():

        def meet(*args: Any, name: str = name, choice: str = choice, **constants: Any) -> None:
            together.wait()
            run(name, choice, False, *args, **constants)

        monkeypatch.setattr(launch, name, defaultdict(lambda meet=meet: meet))
    launch.try_one_row(DEVICE, 64, 64, torch.float16, False)
    assert len(probe.threads) == 4


def test_the_probe_runs_on_a_worker_thread_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(monkeypatch)

    def serve() -> None:
        with torch.inference_mode():
            launch.try_one_row(DEVICE, 128, 128, torch.bfloat16, False)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve).result()
    assert ("_dkv_kernel", True) in probe.launched


def test_a_backward_that_does_not_compile_degrades_with_one_warning(
    on_sm_90: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Probe(monkeypatch, failing="_dkv_kernel")
    reason = "RuntimeError: _dkv_kernel has too many registers"
    with pytest.warns(RuntimeWarning, match=reason):
        assert support.why_unsupported(gpu_call()) == reason
    for deterministic in (True, False):  # a second warning would be an error
        assert support.why_unsupported(gpu_call(deterministic=deterministic)) == reason


def test_other_chips_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    support._chip_reason.cache_clear()
    assert support.why_unsupported(gpu_call()) == "the kernels are written for compute capability 9.0, got 8.6"
    support._chip_reason.cache_clear()


def test_on_a_cpu_the_call_says_so() -> None:
    problem = make_problem(EMULATED[0], torch.float16)
    match = "impl='hopper' cannot run this call: q must be on a CUDA device, got cpu"
    if not torch.cuda.is_available():
        match += "; no CUDA device was found; the Hopper kernels need one of compute capability 9.0; or use"
    with pytest.raises(ValueError, match=match):
        trie_attention(problem.q, problem.k, problem.v, EMULATED[0].trie.subtree_end, impl="hopper")


def test_torch_compile_takes_the_reasons_as_constants(on_sm_90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked while torch.compile traces, with symbolic shapes, the probe still runs on real tensors, once."""
    seen = []
    monkeypatch.setattr(
        launch, "try_one_row", lambda _, dim, __, dtype, ___: seen.append(type(torch.zeros(dim, dtype=dtype)))
    )
    torch._dynamo.reset()

    def attend(x: Tensor) -> Tensor:
        reason = support.why_other_chip(x.device.index or 0)
        for dim, value_dim in support.HEAD_DIMS:
            if x.shape[2] == dim == value_dim and reason is None:
                reason = support.why_broken(x.device.index or 0, dim, value_dim, x.dtype, False)
                return x + 1 if reason is None else x
        return x

    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)
    for rows in (3, 4, 5):
        assert torch.equal(compiled(torch.zeros(rows, 2, 64)), torch.ones(rows, 2, 64))
    assert seen == [Tensor]


# ---------------------------------------------------------------------------------------------------------- GPU

DTYPES = [torch.bfloat16, torch.float16]
GPU_CASES = [Case(trie, heads=(4, 2), dims=(64, 64)) for trie in [*small_tries(), every_offset()]]
GPU_CASES += [Case(trie, heads=(4, 1), dims=(128, 128)) for trie in [*small_tries(), every_offset()]]
GPU_CASES += [Case(trie, heads=(4, 2), dims=(192, 128)) for trie in [*small_tries(), every_offset()]]
GPU_CASES += [Case(trie, heads=(4, 1), dims=(256, 256)) for trie in [*small_tries(), every_offset()]]
GPU_CASES += [
    Case(random_forest(0, 900, mean_length=30.0), heads=(3, 3), dims=(128, 128)),
    Case(random_forest(1, 900, mean_length=3.0), heads=(6, 1), dims=(64, 64), scale=0.3),
    Case(star(300, [200, 129, 1]), heads=(2, 1), dims=(128, 128), scale=-0.1),
    Case(sft_3k(), heads=(8, 2), dims=(128, 128)),
    Case(random_forest(0, 900, mean_length=30.0), heads=(6, 2), dims=(192, 128), scale=-0.1),
    Case(sft_3k(), heads=(8, 2), dims=(192, 128)),
    Case(random_forest(1, 900, mean_length=3.0), heads=(3, 3), dims=(256, 256), scale=0.2),
    Case(sft_3k(), heads=(8, 2), dims=(256, 256)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_every_trie_on_the_gpu(case: Case, dtype: torch.dtype, deterministic: bool) -> None:
    check_case(case, "hopper", dtype, "cuda", deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (256, 256)], ids=str)
def test_branch_points_at_every_offset_of_a_tile_on_the_gpu(dims: tuple[int, int]) -> None:
    for offset in range(128):
        case = Case(fork_at(128 + offset), heads=(2, 1), dims=dims)
        check_case(case, "hopper", torch.bfloat16, "cuda", seed=offset)


@pytest.mark.gpu
def test_random_forests_on_the_gpu() -> None:
    for seed in range(20):
        trie = random_forest(seed, 300 + 61 * seed, mean_length=1 + 4.0 * (seed % 5))
        check_case(Case(trie, heads=(4, 2), dims=(64, 64)), "hopper", torch.bfloat16, "cuda", seed=seed)


@pytest.mark.gpu
def test_layouts_on_the_gpu() -> None:
    """q heads first, k and v slices of one fused projection, a gradient by expansion."""
    problem = make_problem(Case(star(300, [200, 129]), heads=(4, 2), dims=(128, 128)), torch.bfloat16, "cuda")
    end, n = problem.case.trie.subtree_end.cuda(), problem.q.shape[0]
    want = run_impl(dataclasses.replace(problem, grad_out=torch.ones_like(problem.grad_out)), "hopper")
    fused = torch.cat([problem.q, problem.k, problem.v], dim=1).reshape(n, -1).requires_grad_()
    q, k, v = (x.unflatten(1, (-1, 128)) for x in fused.split([512, 256, 256], dim=1))
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    out = trie_attention(q, k, v, end, impl="hopper")
    out.sum().backward()
    assert torch.equal(out, want["out"])
    dq, dk, dv = (x.unflatten(1, (-1, 128)) for x in fused.grad.split([512, 256, 256], dim=1))
    torch.testing.assert_close(dq, want["dq"], rtol=2**-7, atol=2**-7 * float(want["dq"].abs().max()))
    assert torch.equal(dk, want["dk"])
    assert torch.equal(dv, want["dv"])


@pytest.mark.gpu
def test_deterministic_is_bitwise_on_the_gpu() -> None:
    problem = make_problem(Case(sft_3k(), heads=(8, 2), dims=(128, 128)), torch.bfloat16, "cuda")
    first = run_impl(problem, "hopper", deterministic=True)
    for _ in range(9):
        again = run_impl(problem, "hopper", deterministic=True)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_auto_takes_it_on_the_gpu_and_leaves_the_rest_to_triton() -> None:
    def pick(dims: tuple[int, int], **options: Any) -> str:
        case = Case(star(30, [20, 10]), heads=(2, 1), dims=dims)
        problem = make_problem(case, torch.bfloat16, "cuda")
        end = case.trie.subtree_end.cuda()
        return choose_impl(AttentionCall.build(problem.q, problem.k, problem.v, end, **options)).name

    assert pick((128, 128)) == pick((64, 64)) == pick((192, 128)) == pick((256, 256)) == "hopper"
    assert pick((128, 128), window=5) == pick((128, 128), softcap=2.0) == pick((80, 80)) == "triton"


@pytest.mark.gpu
def test_torch_compile_on_the_gpu() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(x: Tensor, end: Tensor) -> Tensor:
        q, k, v = x.split([2, 1, 1], dim=1)
        return trie_attention(q * 1.5, k, v, end, deterministic=True) + 1

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seed in range(20):
        trie: TrieShape = random_forest(seed, 20 + 37 * seed)
        x = torch.randn(trie.num_rows, 4, 64, device="cuda", dtype=torch.bfloat16)
        leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, want = compiled(leaf, trie.subtree_end.cuda()), attend(twin, trie.subtree_end.cuda())
        assert torch.equal(out, want)
        if seed < 3:
            out.sum().backward()
            want.sum().backward()
            assert torch.equal(leaf.grad, twin.grad)
    assert counter.frame_count <= 2


@pytest.mark.gpu
def test_many_lengths_compile_nothing_new_on_the_gpu() -> None:
    slowest = 0.0
    for seed in range(42):
        problem = make_problem(Case(chain(200 + 37 * seed), heads=(4, 2), dims=(64, 64)), torch.bfloat16, "cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        run_impl(problem, "hopper")
        torch.cuda.synchronize()
        if seed >= 2:
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.5


@pytest.mark.gpu
def test_64k_rows_on_the_gpu() -> None:
    """The size where 32-bit offsets overflow, beside the portable kernels and a chunked reference."""
    case = Case(sft_64k(), heads=(32, 8), dims=(128, 128))
    problem = make_problem(case, torch.bfloat16, "cuda")
    ours, portable = run_impl(problem, "hopper"), run_impl(problem, "triton")
    for name, want in portable.items():
        scale = want.double().abs().max()
        assert (ours[name].double() - want.double()).abs().max() <= 2**-6 * scale, name
    rows = torch.linspace(0, case.trie.num_rows - 1, 257).long()
    out, lse = chunked_rows(problem, rows)
    eps = torch.finfo(torch.bfloat16).eps
    assert (ours["out"][rows.cuda()].double() - out).abs().max() <= 2 * eps * out.abs().max()
    assert (ours["lse"][:, rows.cuda()].double() - lse).abs().max() <= 1e-4 * lse.abs().max()
