"""The public function: its arguments, its choice of an implementation, what importing it loads."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor

from tests.support.attention_inputs import TrieShape, comb, random_forest, small_tries, star
from tests.support.tolerances import Case, make_problem
from tw_core.errors import ShapeError, TrieError
from tw_kernels import AttentionCall, AttentionOutput, available_impls, choose_impl, trie_attention
from tw_kernels.trie_attention import call as call_module
from tw_kernels.trie_attention import memo
from tw_kernels.trie_attention.api import IMPLS

TRIE = small_tries()[6]
N = TRIE.num_rows


def qkv(h: int = 4, kv: int = 2, d: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    problem = make_problem(Case(TRIE, heads=(h, kv), dims=(d, d)), dtype)
    return problem.q, problem.k, problem.v


# ------------------------------------------------------------------------------------------------------- arguments


BAD_SHAPES = {
    "q_batched": (
        lambda q, k, v, e: (q[None], k, v, e),
        r"q must have shape \(N, H, D\), got \(1, 159, 4, 8\); pass one",
    ),
    "v_flat": (lambda q, k, v, e: (q, k, v[:, 0], e), r"v must have shape \(N, Hkv, Dv\), got \(159, 8\)"),
    "k_rows": (
        lambda q, k, v, e: (q, k[1:], v, e),
        r"k must have shape \(N, Hkv, D\)=\(159, 2, 8\) to match q, got \(158,",
    ),
    "k_dim": (lambda q, k, v, e: (q, k[..., :4], v, e), r"k must have shape .* to match q, got \(159, 2, 4\)"),
    "v_heads": (lambda q, k, v, e: (q, k, v[:, :1], e), r"v must have shape .* to match q and k, got \(159, 1, 8\)"),
    "heads": (lambda q, k, v, e: (q[:, :3], k, v, e), r"must be a multiple of that of k and v, got H=3 and Hkv=2"),
    "no_dim": (lambda q, k, v, e: (q, k, v[..., :0], e), r"head dimensions must be at least 1, got D=8 and Dv=0"),
    "end": (
        lambda q, k, v, e: (q, k, v, e[:3]),
        r"subtree_end must have shape \(N,\)=\(159,\) to match q, got \(3,\); build",
    ),
    "end_2d": (
        lambda q, k, v, e: (q, k, v, e[None]),
        r"subtree_end must have shape .*, got \(1, 159\); build both from",
    ),
}


@pytest.mark.parametrize(("change", "match"), BAD_SHAPES.values(), ids=BAD_SHAPES.keys())
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_wrong_shapes(change, match: str, impl: str) -> None:
    with pytest.raises(ShapeError, match=match):
        trie_attention(*change(*qkv(), TRIE.subtree_end), impl=impl)


BAD_VALUES = {
    "int": (lambda q, k, v, e: (q.long(), k, v, e), {}, r"q must be floating point, got torch.int64; cast"),
    "mixed": (
        lambda q, k, v, e: (q, k.half(), v, e),
        {},
        r"k must have the dtype of q, torch.float32, got torch.float16",
    ),
    "device": (lambda q, k, v, e: (q, k, v.to("meta"), e), {}, r"v must be on the device of q, cpu, got meta; move it"),
    "end_device": (
        lambda q, k, v, e: (q, k, v, e.to("meta")),
        {},
        r"subtree_end must be on the device of q, cpu, got meta",
    ),
    "end_float": (
        lambda q, k, v, e: (q, k, v, e.float()),
        {},
        r"subtree_end must be int32 \(or int64\), got torch.float32",
    ),
    "stride": (
        lambda q, k, v, e: (q, k.mT.contiguous().mT, v, e),
        {},
        r"k must have stride\(-1\) == 1, got strides \(16, 1, 2\); call k.contiguous\(\)",
    ),
    "window_0": (None, {"window": 0}, r"window must be an int >= 1 \(1 is the row alone\), got 0; pass None for none"),
    "window_bool": (None, {"window": True}, r"window must be an int >= 1 .*, got True"),
    "window_float": (None, {"window": 2.0}, r"window must be an int >= 1 .*, got 2.0"),
    "softcap": (None, {"softcap": 0.0}, r"softcap must be a positive number, got 0.0; pass None for no cap"),
    "scale": (None, {"scale": float("nan")}, r"scale must be finite, got nan; pass None for 1 / sqrt\(D\)"),
    "sinks": (
        None,
        {"sinks": torch.zeros(3)},
        r"sinks must have shape \(H,\)=\(4,\), got \(3,\); pass one logit a query",
    ),
    "sinks_int": (None, {"sinks": torch.zeros(4).long()}, r"sinks must be floating point, got torch.int64"),
    "positions": (
        None,
        {"position_ids": torch.zeros(3).long()},
        r"position_ids must have shape \(N,\)=\(159,\) to match",
    ),
    "impl": (
        None,
        {"impl": "cuda"},
        r"impl must be 'auto' or one of hopper, triton, flex, varlen, dense, reference, got 'cuda'",
    ),
}


@pytest.mark.parametrize(("change", "options", "match"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_wrong_values(change, options: dict, match: str) -> None:
    tensors = (*qkv(), TRIE.subtree_end)
    with pytest.raises(ValueError, match=match):
        trie_attention(*(tensors if change is None else change(*tensors)), **options)


def test_defaults_mean_what_they_say() -> None:
    q, k, v = qkv()
    plain = trie_attention(q, k, v, TRIE.subtree_end)
    assert torch.equal(plain, trie_attention(q, k, v, TRIE.subtree_end, scale=8**-0.5, impl="dense"))
    assert torch.equal(plain, trie_attention(q, k, v, TRIE.subtree_end.long()))
    assert plain.shape == q.shape
    windowed = trie_attention(q, k, v, TRIE.subtree_end, window=5)
    assert not torch.equal(windowed, plain)
    for positions in (TRIE.depth, TRIE.depth.int(), TRIE.depth + 1000):
        assert torch.equal(windowed, trie_attention(q, k, v, TRIE.subtree_end, position_ids=positions, window=5))


def test_a_named_impl_says_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    monkeypatch.setitem(IMPLS, "hopper", IMPLS["hopper"]._replace(why_unavailable=lambda: "there is no CUDA device"))
    match = r"impl='hopper' cannot run this call: q must be on a CUDA device, got cpu; there is no CUDA device; or use"
    with pytest.raises(ValueError, match=match):
        trie_attention(q, k, v, TRIE.subtree_end, impl="hopper")


def test_window_counts_depth_and_not_rows() -> None:
    """Siblings between a row and its parent must not use up the window."""
    q, k, v = qkv()
    last = int(torch.nonzero(TRIE.depth[1:] < TRIE.depth[:-1])[-1]) + 2  # second row of the last branch
    path = torch.nonzero(TRIE.subtree_end[: last + 1] > last)[:, 0]
    assert path[-4] < last - 4  # other branches stand between
    out = trie_attention(q, k, v, TRIE.subtree_end, window=4)
    p = path[-4:]
    logits = torch.einsum("hd,nhd->hn", q[last], k[p].repeat_interleave(2, 1)) * 8**-0.5
    want = torch.einsum("hn,nhd->hd", logits.softmax(-1), v[p].repeat_interleave(2, 1))
    torch.testing.assert_close(out[last], want)


def test_return_lse_is_a_named_tuple_without_gradient() -> None:
    q, k, v = qkv()
    for impl in ("dense", "varlen", "reference"):
        result = trie_attention(q.requires_grad_(), k, v, TRIE.subtree_end, impl=impl, return_lse=True)
        assert isinstance(result, AttentionOutput)
        assert result.lse.shape == (4, N)
        assert result.lse.dtype == torch.float32
        assert result.out.requires_grad
        assert not result.lse.requires_grad


def test_debug_switch_checks_the_forest_for_every_impl(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    crossing = TRIE.subtree_end.clone()
    crossing[0] = 3
    trie_attention(q, k, v, crossing, impl="dense")  # not checked: one host synchronisation a layer is too much
    monkeypatch.setattr(call_module, "DEBUG", True)
    with pytest.raises(TrieError, match="must be that of a forest in preorder"):
        trie_attention(q, k, v, crossing, impl="dense")
    with pytest.raises(TrieError, match="position_ids must rise by one from parent to child"):
        trie_attention(q, k, v, TRIE.subtree_end, position_ids=torch.zeros(N).long(), impl="dense")


# ---------------------------------------------------------------------------------------------------------- choice


def test_available_impls_gives_reasons() -> None:
    impls = available_impls()
    assert list(impls) == list(IMPLS) == ["hopper", "triton", "flex", "varlen", "dense", "reference"]
    assert impls["dense"] is None
    assert impls["reference"] is None
    assert all(reason is None or len(reason) > 20 for reason in impls.values())


def test_without_a_gpu_triton_says_what_is_missing() -> None:
    code = "import json, tw_kernels; print(json.dumps(tw_kernels.available_impls()['triton']))"
    env = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == (
        "no CUDA device was found; set TRITON_INTERPRET=1 before Python starts to run Triton's interpreter"
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "dense"),
        ({"window": 3}, "dense"),
        ({"softcap": 2.0}, "reference"),
        ({"sinks": torch.zeros(4)}, "reference"),
    ],
)
def test_auto_on_a_cpu_takes_the_first_that_can(options: dict, name: str) -> None:
    q, k, v = qkv()
    choice = choose_impl(AttentionCall.build(q, k, v, TRIE.subtree_end, **options))
    assert choice.name == name
    assert "cpu" in choice.reason
    if name == "reference":
        assert "dense: s" in choice.reason  # says what it passed over and why
    out = trie_attention(q, k, v, TRIE.subtree_end, **options)
    assert torch.equal(out, trie_attention(q, k, v, TRIE.subtree_end, impl=name, **options))


def test_auto_on_a_cpu_takes_long_segments_one_by_one() -> None:
    def pick(trie: TrieShape, **options: object) -> str:
        x = torch.zeros(trie.num_rows, 1, 16)
        return choose_impl(AttentionCall.build(x, x, x, trie.subtree_end, **options)).name

    assert pick(star(1024, [400, 400])) == "varlen"
    assert pick(star(800, [100, 100])) == "dense"  # few rows
    assert pick(comb(200, 4, 4)) == "dense"  # 401 short segments
    assert pick(star(1024, [400, 400]), softcap=1.0) == "reference"


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton() -> None:
    q, k, v = (x.cuda() for x in qkv(dtype=torch.bfloat16))  # heads of 16, which the Hopper kernels do not take
    assert choose_impl(AttentionCall.build(q, k, v, TRIE.subtree_end.cuda())).name == "triton"
    wide = AttentionCall.build(*(x.cuda().double() for x in qkv()), TRIE.subtree_end.cuda())
    assert choose_impl(wide).name == "dense"


def test_an_explicit_impl_raises_and_names_those_that_can() -> None:
    q, k, v = qkv()
    match = r"impl='dense' cannot run this call: softcap must be None .*; or use impl='auto' or one of .*reference"
    with pytest.raises(ValueError, match=match):
        trie_attention(q, k, v, TRIE.subtree_end, softcap=5.0, impl="dense")
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this call: q must be .*, got torch.float64"):
        trie_attention(q.double(), k.double(), v.double(), TRIE.subtree_end, impl="triton")
    wide = torch.zeros(N, 1, 320)
    with pytest.raises(ValueError, match=r"head dimensions must be at most 256, got D=320 and Dv=320"):
        trie_attention(wide, wide, wide, TRIE.subtree_end, impl="triton")
    low = q.bfloat16()
    with pytest.raises(ValueError, match=r"float16 or float32 under TRITON_INTERPRET=1"):
        trie_attention(low, low, low, TRIE.subtree_end, impl="triton")


# ---------------------------------------------------------------------------------------------- imports and memory


def test_importing_loads_no_backend() -> None:
    code = (
        "import sys, tw_kernels\n"
        "heavy = ('triton', 'transformers', 'trl', 'torch._dynamo', 'torch._inductor')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_work_is_done_once_per_packed_row_and_forgotten_with_it() -> None:
    """Layers that share a subtree_end share its mask; nothing outlives the tensor; writing into it makes new work."""
    q, k, v = qkv()
    built = []

    def build(alias: Tensor) -> Tensor:
        built.append(1)
        return alias + 1

    end = TRIE.subtree_end.clone()
    first = memo.once_per_tensor(end, "test", build)
    assert memo.once_per_tensor(end, "test", build) is first
    assert len(built) == 1
    end[-1] = N
    memo.once_per_tensor(end, "test", build)
    assert len(built) == 2
    for impl in ("dense", "varlen"):
        trie_attention(q, k, v, end, window=3, impl=impl)
    with torch.no_grad():
        trie_attention(q, k, v, end, window=3, impl="flex")
    watch, remembered = weakref.ref(end), len(memo._entries)
    del end, first
    gc.collect()
    assert watch() is None
    assert len(memo._entries) < remembered


def test_same_row_object_with_new_contents_is_not_mistaken() -> None:
    """A buffer that a collator fills again and again: each batch gets its own mask."""
    q, k, v = qkv()
    other = random_forest(5, N, mean_length=4.0)
    end = TRIE.subtree_end.clone()
    for trie in (TRIE, other, TRIE):
        n = min(N, trie.num_rows)
        end[:n] = trie.subtree_end[:n].clamp(max=N)
        end[n:] = torch.arange(n + 1, N + 1, dtype=torch.int32)
        for impl in ("dense", "varlen"):
            got = trie_attention(q, k, v, end, impl=impl)
            torch.testing.assert_close(got, trie_attention(q, k, v, end.clone(), impl="reference"))
