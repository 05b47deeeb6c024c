"""The one rule for float comparisons: as exact as ordinary eager attention of the same dtype.

    error(impl) <= 2 * (error(eager, same dtype) + eps(dtype) * max|exact|)

for the output, lse and every gradient; `exact` is the reference in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.attention_inputs import TrieShape
from tw_core.masks import dense_mask
from tw_kernels import trie_attention


@dataclass(frozen=True)
class Case:
    """One attention problem: a trie, its head layout and options."""

    trie: TrieShape
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (16, 16)
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        words = [self.trie.name, f"h{self.heads[0]}.{self.heads[1]}", f"d{self.dims[0]}.{self.dims[1]}"]
        words += [f"w{self.window}"] * (self.window is not None) + [f"cap{self.softcap}"] * (self.softcap is not None)
        return "-".join(words + ["sinks"] * self.sinks + [f"scale{self.scale}"] * (self.scale is not None))


@dataclass(frozen=True)
class Problem:
    """Inputs of one case and the gradient that flows into its output."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    grad_out: Tensor

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of trie_attention, without tensors."""
        return {"window": self.case.window, "softcap": self.case.softcap, "scale": self.case.scale}

    def to(self, **kwargs: Any) -> Problem:
        """The same numbers in another dtype or on another device."""
        tensors = (self.q, self.k, self.v, self.sinks, self.grad_out)
        return Problem(self.case, *(x if x is None else x.detach().to(**kwargs) for x in tensors))


Results = dict[str, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def make_problem(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Problem:
    """Normal queries, keys, values and output gradients, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    (heads, kv_heads), (dim, value_dim), n = case.heads, case.dims, case.trie.num_rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).to(device)

    return Problem(
        case=case,
        q=normal(n, heads, dim),
        k=normal(n, kv_heads, dim),
        v=normal(n, kv_heads, value_dim),
        sinks=normal(heads) if case.sinks else None,
        grad_out=normal(n, heads, value_dim),
    )


def run_impl(problem: Problem, impl: str, **options: Any) -> Results:
    """Output, lse and gradients of one implementation."""
    end = problem.case.trie.subtree_end.to(problem.q.device)
    depth = problem.case.trie.depth.to(problem.q.device)

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        every = problem.options | options
        return trie_attention(q, k, v, end, position_ids=depth, sinks=sinks, impl=impl, return_lse=True, **every)

    return differentiate(attention, problem)


def run_eager(problem: Problem) -> Results:
    """Attention as an eager model computes it: products rounded to the inputs' dtype, softmax in at least float32."""
    case = problem.case
    visible = dense_mask(case.trie.subtree_end).to(problem.q.device)
    if case.window is not None:
        depth = case.trie.depth.to(problem.q.device)
        visible &= depth[:, None] - depth[None, :] < case.window
    group = case.heads[0] // case.heads[1]
    scale = case.dims[0] ** -0.5 if case.scale is None else case.scale

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = q.transpose(0, 1), k.repeat_interleave(group, 1).transpose(0, 1), v.repeat_interleave(group, 1)
        logits = (q @ k.mT) * scale  # (H, N, N)
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        logits = logits.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1)], dim=-1)
        wide = logits.to(torch.promote_types(q.dtype, torch.float32))
        p = wide.softmax(-1).to(q.dtype)[..., : visible.shape[1]]
        return (p @ v.transpose(0, 1)).transpose(0, 1), wide.logsumexp(-1)

    return differentiate(attention, problem)


def differentiate(attention: Attention, problem: Problem) -> Results:
    """Call and backpropagate `grad_out`."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v))
    sinks = None if problem.sinks is None else problem.sinks.detach().clone().requires_grad_()
    out, lse = attention(q, k, v, sinks)
    out.backward(problem.grad_out)
    results = {"out": out.detach(), "lse": lse.detach()}
    leaves = {"dq": q, "dk": k, "dv": v} | ({} if sinks is None else {"dsinks": sinks})
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} is missing"
        results[name] = leaf.grad
    return results


def exact_results(problem: Problem) -> Results:
    """The reference in float64 on the same numbers."""
    return run_impl(problem.to(device="cpu", dtype=torch.float64), "reference")


def assert_as_exact_as_eager(
    got: Results, eager: Results, exact: Results, dtype: torch.dtype, cancelling: float = 0.0
) -> None:
    """The rule at the top of this file, for every entry of `got`.

    dq and dk of rows that see themselves alone are zero, as a difference of equal terms: where all of a gradient is
    zero, its error is held against `cancelling`, the size of those terms.
    """
    eps = torch.finfo(dtype).eps
    broken = []
    for name, value in got.items():
        truth = exact[name].double()
        size = max_abs(truth)
        if name in ("dq", "dk") and size < 1e-9 * cancelling:
            size = cancelling
        allowed = 2 * (max_error(eager[name], truth) + eps * size)
        error = max_error(value, truth)
        if not error <= allowed:  # NaN counts as broken
            broken.append(f"{name}: error {error:.3e} > {allowed:.3e} (max |exact| {max_abs(truth):.3e})")
    if broken:
        pytest.fail("; ".join(broken))


def check_case(
    case: Case, impl: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0, **options: Any
) -> Results:
    """Run one case on one implementation, apply the rule, return what it computed."""
    problem = make_problem(case, dtype, device, seed)
    exact, eager = exact_results(problem), run_eager(problem)
    with nan_poison():
        got = run_impl(problem, impl, **options)
    assert got["out"].dtype == dtype
    assert got["lse"].shape == (case.heads[0], case.trie.num_rows)
    assert_as_exact_as_eager(got, eager, exact, dtype, cancelling_terms(problem))
    return got


def cancelling_terms(problem: Problem) -> float:
    """Size of the terms (dO . v) k scale of which dq is a difference; likewise dk."""
    group = problem.case.heads[0] // problem.case.heads[1]
    v = problem.v.double().repeat_interleave(group, dim=1)
    products = torch.einsum("nhd,nhd->nh", problem.grad_out.double(), v)
    scale = problem.case.dims[0] ** -0.5 if problem.case.scale is None else problem.case.scale
    return max_abs(products) * scale * max(max_abs(problem.q), max_abs(problem.k))


def chunked_rows(problem: Problem, rows: Tensor, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Output and lse of some rows in float64, a few rows at a time: for tries whose square would not fit.

    Plain softmax attention (no window, softcap or sinks); returns (R, H, Dv) and (H, R) on the problem's device.
    """
    end, case = problem.case.trie.subtree_end.to(problem.q.device), problem.case
    every = torch.arange(case.trie.num_rows, device=problem.q.device)
    outs, lses = [], []
    for some in rows.to(problem.q.device).split(chunk):
        q = problem.q[some].double().unflatten(1, (case.heads[1], -1))  # (R, Hkv, G, D)
        logits = torch.einsum("rkgd,nkd->kgrn", q, problem.k.double()) * case.dims[0] ** -0.5
        visible = (every <= some[:, None]) & (some[:, None] < end)
        logits = logits.masked_fill(~visible, float("-inf"))
        outs.append(torch.einsum("kgrn,nkd->rkgd", logits.softmax(-1), problem.v.double()).flatten(1, 2))
        lses.append(logits.logsumexp(-1).flatten(0, 1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def max_abs(x: Tensor) -> float:
    """Largest magnitude, 0 for an empty tensor."""
    return float(x.abs().max()) if x.numel() else 0.0


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference; NaN or infinite when any entry of `value` is."""
    assert value.shape == truth.shape, f"shape {tuple(value.shape)} instead of {tuple(truth.shape)}"
    return max_abs(value.detach().double().to(truth.device) - truth)


@contextmanager
def nan_poison() -> Iterator[None]:
    """Fill what torch.empty, torch.empty_like and Tensor.new_empty return with NaN: an entry never written shows."""
    patch = pytest.MonkeyPatch()

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            result = function(*args, **kwargs)
            with torch.no_grad():  # flex's tracing allocates what requires gradients
                return result.fill_(float("nan")) if result.dtype.is_floating_point else result

        return allocate

    with patch.context() as patched:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patched.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
