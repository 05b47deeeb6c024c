"""What bench_trie_attention.py times: our implementations, and what a user would otherwise run.

Each entry of `RUNS` prepares a `Run` for one trie: everything that a training step would prepare once per batch is done
there (plans, gathered sequences), so that `forward` is what a layer does. `Judge` holds exact values on sampled rows.
`cudnn_equal_chain` is a yardstick: cuDNN on one causal chain with as many visible pairs as the trie has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.support import attention_inputs
from tests.support.attention_inputs import TrieShape
from torch import Tensor

from tw_core.masks import block_mask, dense_mask
from tw_kernels import AttentionCall, choose_impl, trie_attention
from tw_kernels.trie_attention import varlen
from tw_kernels.trie_attention.plan import make_plan


@dataclass(frozen=True)
class Inputs:
    """Random packed queries, keys, values and output gradient of one trie, on the device."""

    trie: TrieShape
    q: Tensor  # (N, H, D)
    k: Tensor  # (N, Hkv, D)
    v: Tensor  # (N, Hkv, D)
    grad_out: Tensor  # (N, H, D)
    end: Tensor  # (N,) int32

    @property
    def forward_flop(self) -> float:
        """4 x visible pairs x D x H."""
        return 4.0 * self.trie.visible_pairs * self.q.shape[2] * self.q.shape[1]


@dataclass(frozen=True)
class Run:
    """One implementation on one trie.

    Attributes:
        forward: Computes the output from `leaves`.
        leaves: q, k and v as this implementation wants them; they require a gradient.
        grad_out: Gradient of the output, in the output's layout.
        rows: Row of the trie of each entry along dimension 0 of the output and the leaves; None when they are the rows.
        forward_flop: Where it computes something else than the trie: FLOPs of its forward. It cannot be judged then.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor
    rows: Tensor | None = None
    forward_flop: float | None = None


def make_inputs(trie: TrieShape, device: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Inputs:
    """Normal values from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    n = trie.num_rows

    def normal(h: int) -> Tensor:
        return torch.randn((n, h, dim), generator=generator, device=device, dtype=dtype)

    q, k, v, grad_out = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    return Inputs(trie, q, k, v, grad_out, trie.subtree_end.to(device))


def auto_choice(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    """What impl="auto" runs for a model with the sizes of `config`."""
    heads, kv_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k = (torch.empty((8, count, dim), device=device, dtype=dtype) for count in (heads, kv_heads))
    return choose_impl(AttentionCall.build(q, k, k, torch.full((8,), 8, dtype=torch.int32, device=device))).name


def leaves_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)


def packed(impl: str, **options: object) -> Callable[[Inputs], Run]:
    """One of our implementations through the public function."""

    def prepare(inputs: Inputs) -> Run:
        q, k, v = leaves_of(inputs.q, inputs.k, inputs.v)
        plan = make_plan(inputs.end) if impl in ("hopper", "triton") else None
        return Run(
            lambda: trie_attention(q, k, v, inputs.end, impl=impl, plan=plan, **options), (q, k, v), inputs.grad_out
        )

    return prepare


def flex_dense_mask(inputs: Inputs) -> Run:
    """The published path: FlexAttention over a BlockMask made from a materialised (N, N) mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = inputs.trie.num_rows
    mask = dense_mask(inputs.end)
    blocks = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, n, n, device=inputs.q.device)
    compiled = torch.compile(flex_attention, dynamic=True)
    q, k, v = leaves_of(inputs.q, inputs.k, inputs.v)

    def forward() -> Tensor:
        batched = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*batched, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return Run(forward, (q, k, v), inputs.grad_out)


def expand(inputs: Inputs) -> tuple[Tensor, list[int]]:
    """Rows of all sequences one after the other, and their lengths."""
    sequences = [inputs.trie.sequence_rows(i) for i in range(len(inputs.trie.last_rows))]
    return torch.cat(sequences).to(inputs.q.device), [len(rows) for rows in sequences]


def expanded_flash(inputs: Inputs) -> Run:
    """Every sequence on its own, padding-free: torch's varlen flash attention over all of them in one call."""
    from torch.nn.attention.varlen import varlen_attn

    rows, lengths = expand(inputs)
    q, k, v = leaves_of(*(x[rows] for x in (inputs.q, inputs.k, inputs.v)))
    starts = torch.tensor([0, *lengths], device=rows.device).cumsum(0, dtype=torch.int32)
    grouped = {"enable_gqa": True} if "enable_gqa" in varlen._torch_varlen_options() else {}
    batch = (q, k, v, starts, starts, max(lengths), max(lengths))

    def forward() -> Tensor:
        return varlen_attn(*batch, window_size=(-1, 0), **grouped)

    return Run(forward, (q, k, v), inputs.grad_out[rows], rows)


def expanded_cudnn(inputs: Inputs) -> Run:
    """Every sequence on its own through SDPA's cuDNN backend, one call a sequence."""
    from torch.nn.attention import SDPBackend

    return _expanded_sdpa(inputs, SDPBackend.CUDNN_ATTENTION)


def expanded_sdpa(inputs: Inputs) -> Run:
    """Every sequence on its own through SDPA's own choice of backend (flash where it can, the CPU's on a CPU)."""
    from torch.nn.attention import SDPBackend

    return _expanded_sdpa(inputs, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _expanded_sdpa(inputs: Inputs, backend: object) -> Run:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    rows, lengths = expand(inputs)
    q, k, v = leaves_of(*(x[rows] for x in (inputs.q, inputs.k, inputs.v)))
    grad_out = inputs.grad_out[rows]

    def forward() -> Tensor:
        outs = []
        with sdpa_kernel(backend):
            for q_s, k_s, v_s in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
                batched = (x.transpose(0, 1)[None] for x in (q_s, k_s, v_s))
                out = scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True)
                outs.append(out[0].transpose(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return Run(forward, (q, k, v), grad_out, rows)


def equal_chain(prepare: Callable[[Inputs], Run]) -> Callable[[Inputs], Run]:
    """`prepare` on a causal chain of equal FLOPs: N (N + 1) / 2 is the trie's visible pairs, N rounded to 128."""

    def prepare_chain(inputs: Inputs) -> Run:
        rows = max(1, round(math.sqrt(2 * inputs.trie.visible_pairs) / 128)) * 128
        sizes = (inputs.q.shape[1], inputs.k.shape[1], inputs.q.shape[2])
        chain = make_inputs(attention_inputs.chain(rows), inputs.q.device.type, *sizes, inputs.q.dtype)
        return replace(prepare(chain), rows=None, forward_flop=chain.forward_flop)

    return prepare_chain


RUNS: dict[str, Callable[[Inputs], Run]] = {
    "hopper": packed("hopper"),
    "hopper_deterministic": packed("hopper", deterministic=True),
    "triton": packed("triton"),
    "triton_deterministic": packed("triton", deterministic=True),
    "flex": packed("flex"),
    "varlen": packed("varlen"),
    "expanded_flash": expanded_flash,
    "expanded_cudnn": expanded_cudnn,
    "cudnn_equal_chain": equal_chain(expanded_cudnn),
    "flex_dense_mask": flex_dense_mask,
    "expanded_sdpa": expanded_sdpa,
    "sdpa_equal_chain": equal_chain(expanded_sdpa),
    "dense": packed("dense"),
    "reference": packed("reference"),
}


def planners() -> dict[str, Callable[[Tensor], object]]:
    """What each packed implementation prepares once per packed row, from subtree_end on the device."""

    return {"hopper": make_plan, "triton": make_plan, "flex": block_mask, "varlen": varlen.make_segments}


class Judge:
    """Exact output and gradients on sampled rows, in float32 from one chunked pass over all rows.

    Errors are max |difference| over max |exact|, on `samples` rows of out and dq and as many of dk and dv.
    """

    def __init__(self, inputs: Inputs, samples: int = 64, chunk: int = 128) -> None:
        self.inputs = inputs
        n, device = inputs.trie.num_rows, inputs.q.device
        group = inputs.q.shape[1] // inputs.k.shape[1]
        scale = inputs.q.shape[2] ** -0.5
        self.rows = torch.linspace(0, n - 1, min(samples, n), device=device).long()
        # Heads in groups: (N, Hkv, G, D); keys (N, Hkv, D).
        q, grad = (x.float().unflatten(1, (-1, group)) for x in (inputs.q, inputs.grad_out))
        k, v = inputs.k.float(), inputs.v.float()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        every = torch.arange(n, device=device)

        def logits_of(some: Tensor, keys: Tensor) -> Tensor:
            """(Hkv, G, R, M) masked logits of rows `some` and `keys`."""
            logits = torch.einsum("rkgd,mkd->kgrm", q[some], k[keys]).mul_(scale)
            visible = (keys <= some[:, None]) & (some[:, None] < inputs.end[keys])
            return logits.masked_fill_(~visible, float("-inf"))

        for some in every.split(chunk):
            logits = logits_of(some, every[: int(some[-1]) + 1])
            lse[some] = logits.logsumexp(-1).permute(2, 0, 1)
            p = logits.sub_(lse[some].permute(1, 2, 0)[..., None]).exp_()
            out[some] = torch.einsum("kgrm,mkd->rkgd", p, v[: p.shape[-1]])
        delta = (out * grad).sum(-1)  # (N, Hkv, G)

        def d_logits(some: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            p = (logits_of(some, keys) - lse[some].permute(1, 2, 0)[..., None]).exp()
            dp = torch.einsum("rkgd,mkd->kgrm", grad[some], v[keys])
            return p, p * (dp - delta[some].permute(1, 2, 0)[..., None]) * scale

        r = self.rows
        dq = torch.cat([torch.einsum("kgrm,mkd->rkgd", d_logits(some, every)[1], k) for some in r.split(16)])
        dk, dv = torch.zeros_like(k[r]), torch.zeros_like(v[r])
        for some in every.split(8192):
            p, ds = d_logits(some, r)
            dk += torch.einsum("kgrm,rkgd->mkd", ds, q[some])
            dv += torch.einsum("kgrm,rkgd->mkd", p, grad[some])
        self.exact = {"out": out[r].flatten(1, 2), "dq": dq.flatten(1, 2), "dk": dk, "dv": dv}

    def errors(self, run: Run) -> dict[str, float]:
        """Relative errors of out, dq, dk and dv of one run."""
        n = self.inputs.trie.num_rows
        out = run.forward()
        if run.rows is None:
            grads = torch.autograd.grad(out, run.leaves, run.grad_out)
            got = [out.detach(), *grads]
        else:
            # A row that stands in many sequences: its output is that of the first, and its output gradient enters once.
            first = torch.full((n,), len(run.rows), device=run.rows.device).scatter_reduce_(
                0, run.rows, torch.arange(len(run.rows), device=run.rows.device), "amin"
            )
            once = torch.zeros_like(run.grad_out)
            once[first] = run.grad_out[first]
            grads = torch.autograd.grad(out, run.leaves, once)
            got = [out.detach()[first]]
            got += [
                g.new_zeros((n, *g.shape[1:]), dtype=torch.float32).index_add_(0, run.rows, g.float()) for g in grads
            ]
        errors = {}
        for name, value in zip(("out", "dq", "dk", "dv"), got, strict=True):
            exact = self.exact[name]
            error = (value[self.rows].float() - exact).abs().max() / exact.abs().max()
            errors[name] = float(error)
        return errors
