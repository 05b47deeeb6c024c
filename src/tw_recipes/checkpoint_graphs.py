"""Activation checkpointing of decoder layers as CUDA graphs: a step of few rows takes what its kernels take.

    forward     rows copied in ──► graph of the layer ──► rows copied out; only the rows that went in are saved
    backward    rows and gradient copied in ──► graph of the layer again and its backward ──► gradients copied out

A layer of a packed row issues about a hundred operations whether the row has ten tokens or ten thousand, and up to some
thousands the host takes longer to issue them than the GPU to compute. Replayed, they are one launch. The kernels and
their order are those of `torch.utils.checkpoint`, so are the numbers.

A graph holds shapes and addresses fixed. Rows are therefore padded to the sizes of `padded_rows`, eight to an octave
(`PackedTrie.pad_to`: rows that nobody sees); each layer has two graphs for each size that occurs, captured when it
first does. All graphs share one pool of memory, that of one layer's activations, since no two run at once and what they
return is copied. Parameters are read where they lie; graphs of a layer whose parameters or adapters are others are made
anew.

Without a GPU the same steps run uncaptured. Tests: tests/recipes/test_checkpoint_graphs.py.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tw_recipes import hybrid
from tw_recipes.captures import capturing, clear_up, held_fixed
from tw_recipes.support import decoder_layers

LEAST = 128


def padded_rows(rows: int) -> int:
    """The size that so many rows are padded to: a multiple of an eighth of the power of two below, 128 at least."""
    step = max(LEAST, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step


class CheckpointGraphs:
    """A function for the layers of a model in place of `torch.utils.checkpoint.checkpoint`.

    Args:
        model: Its decoder layers, as they are now.
        largest: Longer rows, and rows that are not of one of the sizes, go to the function that was there before.

    Raises:
        GraphError: (at a layer's first call of a size) The layer cannot be captured; the message says why.
    """

    def __init__(self, model: nn.Module, largest: int) -> None:
        self.largest = largest
        self._of_model = decoder_layers(model)
        self._shapes: dict[Any, _Shape] = {}
        self._layers: dict[nn.Module, dict[Any, _LayerGraphs]] = {}
        self._gradients: dict[Any, Tensor] = {}
        self._pool: Any = None

    def install(self) -> None:
        """Take the place of the checkpointing function of every layer that checkpoints now.

        Enabling checkpointing anew undoes it; installing again changes nothing.
        """
        for layer in self._of_model:
            before = getattr(layer, "_gradient_checkpointing_func", None)
            ours = isinstance(before, partial) and getattr(before.func, "__self__", None) is self
            if layer.gradient_checkpointing and not ours:
                layer._gradient_checkpointing_func = partial(self._checkpoint, layer, before)

    @torch.compiler.disable
    def _checkpoint(self, layer: nn.Module, before: Callable[..., Any], function: Any, *args: Any) -> Any:
        rows = args[0].shape[1]
        if rows > self.largest or rows != padded_rows(rows) or args[0].shape[0] != 1:
            return before(function, *args)
        if len(args) != 1 or not isinstance(function, partial):
            raise GraphError(layer, f"it has {len(args)} positional arguments, where one, the rows, was expected")
        leaves, spec = tree_flatten(function.keywords)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (
            spec,
            *(_kind(leaf) if isinstance(leaf, Tensor) else leaf for leaf in (*args, *leaves)),
            torch.is_autocast_enabled(args[0].device.type),
            torch.get_autocast_dtype(args[0].device.type),
        )
        graphs = self._graphs(layer, key, function, args[0], leaves, spec)
        return _Replayed.apply(graphs, tensors, args[0], *graphs.parameters)

    def _graphs(
        self, layer: nn.Module, key: Any, function: Any, rows: Tensor, leaves: list[Any], spec: TreeSpec
    ) -> "_LayerGraphs":
        known = self._layers.setdefault(layer, {})
        state = held_fixed(layer)
        if key in known and known[key].state == state:
            return known[key]
        known.pop(key, None)
        _check(layer, function.keywords, leaves)
        if key not in self._shapes:
            self._shapes[key] = _Shape(rows, leaves, spec)
        call = partial(function.func, *function.args)
        graphs = _LayerGraphs(layer, state, self._shapes[key], call, self._gradients)
        if rows.is_cuda:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graphs.capture(self._pool)
        known[key] = graphs
        return graphs


class GraphError(ValueError):
    """A layer cannot be captured in a CUDA graph."""

    def __init__(self, layer: nn.Module, reason: str) -> None:
        super().__init__(f"{type(layer).__name__} cannot be replayed as CUDA graphs: {reason}; set graph_rows=0")


class _Shape:
    """What all layers of one shape read and write: the rows and what goes with them, and their gradients."""

    def __init__(self, rows: Tensor, leaves: list[Any], spec: TreeSpec) -> None:
        self.rows, self.out, self.grad_out, self.grad_rows = (torch.zeros_like(rows.detach()) for _ in range(4))
        self._leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._spec = spec
        self.keywords = tree_unflatten(self._leaves, spec)
        self._bound: Sequence[Tensor] = ()
        device = rows.device.type
        self.enabled, self.dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Take what goes with the rows, unless it is what the layer before had."""
        if len(self._bound) == len(tensors) and all(a is b for a, b in zip(self._bound, tensors, strict=True)):
            return
        self._bound = tensors
        if not self.rows.is_cuda:  # uncaptured: the tensors themselves, for which attention remembers its work
            mine = iter(tensors)
            leaves = [next(mine) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
            self.keywords = tree_unflatten(leaves, self._spec)
            return
        held = (leaf for leaf in self._leaves if isinstance(leaf, Tensor))
        for mine, given in zip(held, tensors, strict=True):
            mine.copy_(given)

    def autocast(self) -> AbstractContextManager[Any]:
        """That of the call, without its cache: a graph must cast the weights of every replay."""
        return torch.autocast(self.rows.device.type, self.dtype, enabled=self.enabled, cache_enabled=False)


class _LayerGraphs:
    """The two graphs of a layer for one shape."""

    def __init__(
        self, layer: nn.Module, state: Any, shape: _Shape, call: Callable[..., Any], gradients: dict[Any, Tensor]
    ) -> None:
        self.layer, self.state, self.shape, self._call = layer, state, shape, call
        self.parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        # Gradients lie one after another, a run for each dtype, so that one copy takes them out.
        self.runs: list[tuple[Tensor, list[Tensor], list[int]]] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.parameters):
            places = [i for i, parameter in enumerate(self.parameters) if parameter.dtype == dtype]
            size = sum(self.parameters[i].numel() for i in places)
            place = (dtype, size, shape.rows.device)
            if place not in gradients:
                gradients[place] = shape.rows.new_zeros(size, dtype=dtype)
            self.runs.append((gradients[place], self._cut(gradients[place], places), places))
        self.reached = [True] * len(self.parameters)
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def _cut(self, run: Tensor, places: list[int]) -> list[Tensor]:
        chosen = [self.parameters[i] for i in places]
        parts = run.split([parameter.numel() for parameter in chosen])
        return [part.view(parameter.shape) for part, parameter in zip(parts, chosen, strict=True)]

    def forward(self) -> None:
        """`shape.rows` -> `shape.out`."""
        self._run(0, self._forward)

    def backward(self) -> None:
        """`shape.rows` and `shape.grad_out` -> `shape.grad_rows` and `runs`."""
        self._run(1, self._backward)

    def gradients(self) -> list[Tensor | None]:
        """A copy of what `backward` found for each parameter."""
        found: list[Tensor | None] = [None] * len(self.parameters)
        for run, _, places in self.runs:
            for i, part in zip(places, self._cut(run.clone(), places), strict=True):
                found[i] = part if self.reached[i] else None
        return found

    def _run(self, which: int, body: Callable[[], None]) -> None:
        if self._graphs is None:
            body()
        else:
            self._graphs[which].replay()

    def _forward(self) -> None:
        shape = self.shape
        with torch.no_grad(), shape.autocast():
            out = self._call(shape.rows, **shape.keywords)
            if not isinstance(out, Tensor) or out.shape != shape.out.shape:
                raise GraphError(self.layer, f"it returns {type(out).__name__}, not the rows alone")
            shape.out.copy_(out)

    def _backward(self) -> None:
        shape = self.shape
        with torch.enable_grad():
            rows = shape.rows.detach().requires_grad_()
            with shape.autocast():
                out = self._call(rows, **shape.keywords)
            found = torch.autograd.grad(out, [rows, *self.parameters], shape.grad_out, allow_unused=True)
        shape.grad_rows.copy_(found[0])
        self.reached = [gradient is not None for gradient in found[1:]]
        for _, parts, places in self.runs:
            for i, part in zip(places, parts, strict=True):
                if self.reached[i]:
                    part.copy_(found[1 + i])

    def capture(self, pool: Any) -> None:
        """Record both; libraries set themselves up in runs before, outside of the capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()
            self._backward()
        torch.cuda.current_stream().wait_stream(stream)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, body in zip(graphs, (self._forward, self._backward), strict=True):
            try:
                with capturing(graph, pool):
                    body()
            except RuntimeError as error:
                clear_up(graph)
                raise GraphError(self.layer, str(error).partition("\n")[0]) from error
        self._graphs = graphs


class _Replayed(torch.autograd.Function):
    """A layer by its graphs; what it keeps for the backward is the rows that went in."""

    @staticmethod
    def forward(ctx: Any, graphs: _LayerGraphs, tensors: list[Tensor], rows: Tensor, *parameters: Tensor) -> Tensor:
        shape = graphs.shape
        shape.bind(tensors)
        shape.rows.copy_(rows)
        graphs.forward()
        ctx.save_for_backward(rows)
        ctx.graphs, ctx.tensors = graphs, tensors
        return shape.out.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        shape = ctx.graphs.shape
        (rows,) = ctx.saved_tensors
        shape.bind(ctx.tensors)
        shape.rows.copy_(rows)
        shape.grad_out.copy_(grad_out)
        ctx.graphs.backward()
        grad_rows = shape.grad_rows.clone() if ctx.needs_input_grad[2] else None
        return None, None, grad_rows, *ctx.graphs.gradients()


def _kind(x: Tensor) -> tuple[Any, ...]:
    return (tuple(x.shape), x.stride(), x.dtype, x.device)


def _check(layer: nn.Module, keywords: dict[str, Any], leaves: list[Any]) -> None:
    """Refuse what a replay would leave out or repeat wrongly.

    Raises:
        GraphError: A recurrence, a hook, dropout, a parameter in shards, or an argument that cannot be held fixed.
    """
    if any(keywords.get(name) is not None for name in hybrid.TREE_KWARGS):
        raise GraphError(layer, "its model has recurrent layers, which take the trie in pieces of any number")
    for name, module in layer.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise GraphError(layer, f"{name or 'it'} has hooks, which would not run in a replay")
        if isinstance(module, nn.Dropout) and module.p and module.training:
            raise GraphError(layer, f"{name} drops out with p={module.p}, and would draw otherwise in the backward")
    for name, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.numel() == 0:
            raise GraphError(
                layer, f"parameter {name} is a {type(parameter).__name__} without a fixed place of its own"
            )
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                raise GraphError(layer, "an argument beside the rows needs a gradient")
        elif not (leaf is None or isinstance(leaf, bool | int | float | str)):
            raise GraphError(layer, f"a {type(leaf).__name__} among its arguments cannot be held fixed")
