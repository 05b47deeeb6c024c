"""Decoding steps of fixed shape, replayed as CUDA graphs: a token costs what its kernels take, not their launches.

    prefill (eager) ──► buffers with room for more tokens and rows ──► captured once ──► replayed for every token
    the room is used up, or half of the rows have finished ──► moved to buffers of another shape

Rows come in powers of two and tokens in multiples of `ROOM`, so that one batch after another meets the same shapes:
`FixedSteps` keeps their buffers and graphs. Rows without a call, or with one that has finished, compute on unread. Only
for models whose every layer has full attention by SDPA: see `fits` and `holds`. Without a GPU the steps run uncaptured.

Tests: tests/recipes/decoding/test_fixed_step.py.
"""

import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from tw_recipes import _compat
from tw_recipes.captures import adapts, capturing, clear_up, held_fixed

ROOM = 256
"""Tokens that buffers grow by. A capture takes about as long as two steps without a graph."""
KEPT_BYTES = 4 * 2**30
"""Keys and values that `FixedSteps` keeps for batches to come."""


def fits(model: Any) -> bool:
    """Whether steps of `model`, as its attention is set now, can be captured.

    Returns:
        True on a CUDA device, outside autocast, for SDPA.
    """
    sdpa = model.config.get_text_config()._attn_implementation == "sdpa"
    return bool(model.device.type == "cuda" and sdpa and not torch.is_autocast_enabled("cuda"))


def holds(cache: DynamicCache) -> bool:
    """Whether every layer of a prefilled cache is one of full attention, which fixed steps need."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


class FixedSteps:
    """Buffers and graphs of one model by shape, for one batch at a time.

    They are made anew when the model's parameters lie elsewhere or it has other hooks, and for every batch where PEFT
    layers are in it, whose adapters can be switched without a trace.

    Args:
        model: A causal language model, see `fits`.
        room: Tokens that buffers grow by.
        kept_bytes: Bounds what is kept; the shapes used last stay.
    """

    def __init__(self, model: Any, *, room: int = ROOM, kept_bytes: int = KEPT_BYTES) -> None:
        self.model, self.room, self.kept_bytes = model, room, kept_bytes
        self.captures = model.device.type == "cuda"
        self._kept: OrderedDict[tuple[int, int], _Buffers] = OrderedDict()
        self._made_for: Any = None

    def begin(self, cache: DynamicCache, mask: Tensor, positions: Tensor) -> "FixedStep":
        """The steps after a prefill.

        Args:
            cache: Prefilled, R rows, S tokens, see `holds`. It is not needed afterwards.
            mask: Which of the S tokens a row may see. int64[R, S], 1 or 0.
            positions: Position of each row's next token. int64[R, 1].
        """
        current = self._fingerprint()
        if current is None or current != self._made_for:
            self.clear()
        self._made_for = current
        return FixedStep(self, [(layer.keys, layer.values) for layer in cache.layers], mask, positions)

    def clear(self) -> None:
        """Free all buffers that no batch uses."""
        self._kept.clear()

    def take(self, rows: int, tokens: int, like: list[tuple[Tensor, Tensor]]) -> "_Buffers":
        """Buffers for at least so many rows and one token more than `tokens`."""
        shape = (1 << (rows - 1).bit_length(), (tokens // self.room + 1) * self.room)
        return self._kept.pop(shape, None) or _Buffers(shape, like)

    def give(self, buffers: "_Buffers") -> None:
        """Keep buffers for a later batch, as far as they fit."""
        self._kept[buffers.shape] = buffers
        while sum(entry.nbytes for entry in self._kept.values()) > self.kept_bytes:
            self._kept.popitem(last=False)

    def _fingerprint(self) -> Any:
        if any(map(adapts, self.model.modules())):
            return None
        forward = getattr(self.model.forward, "__func__", self.model.forward)
        return held_fixed(self.model), id(forward)


class FixedStep:
    """The next token of every row of a batch, again and again; `FixedSteps.begin` makes it."""

    def __init__(self, steps: FixedSteps, layers: list[tuple[Tensor, Tensor]], mask: Tensor, positions: Tensor) -> None:
        self.steps, self.model = steps, steps.model
        self.cache_name = _compat.cache_argument(self.model)
        self.rows, self.length = mask.shape
        self.at = steps.take(self.rows, self.length, layers)
        self.at.fill(layers, mask.bool()[:, None, None, :], positions)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of each row's next token; they are overwritten by the next call.

        Args:
            tokens: The last token of each row. int64[R].

        Returns:
            [R, vocabulary], in the type of the model.
        """
        if self.length == self.at.shape[1]:
            self._move(slice(self.rows))
        self.at.ids[: self.rows] = tokens[:, None]
        if self.steps.captures and self.at.graph is None:
            self._capture()
        if self.at.graph is None:
            self.at.logits = self._forward()
        else:
            self.at.graph.replay()
        self.length += 1
        return self.at.logits[: self.rows]

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows. int64[K], K at most half of them; none ends the batch."""
        if len(rows):
            self.rows = len(rows)
            self._move(rows)
        else:
            self.steps.give(self.at)

    def _move(self, rows: Tensor | slice) -> None:
        old = self.at
        layers = [(layer.keys[rows, :, : self.length], layer.values[rows, :, : self.length]) for layer in old.layers]
        self.at = self.steps.take(self.rows, self.length, layers)
        self.at.fill(layers, old.mask[rows, ..., : self.length], old.positions[rows])
        self.steps.give(old)

    def _forward(self) -> Tensor:
        at = self.at
        at.mask.index_fill_(3, at.slot, True)
        output = self.model(
            input_ids=at.ids,
            attention_mask=at.mask,  # four dimensions: taken as it is by every layer
            position_ids=at.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: Cache(layers=list(at.layers))},
        )
        at.positions.add_(1)
        at.slot.add_(1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _capture(self) -> None:
        """Capture a step; where that fails, say why once and run without graphs from here on."""
        at, stream = self.at, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()  # libraries set themselves up outside the capture; it writes what the step itself will
            at.positions.sub_(1)
            at.slot.sub_(1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph):
                at.logits = self._forward()
        except RuntimeError as error:
            self.steps.captures = False
            clear_up(graph)
            message = str(error).partition("\n")[0]
            warnings.warn(f"decoding runs without CUDA graphs: {type(self.model).__name__}: {message}", stacklevel=2)
        else:
            at.graph = graph


class _Buffers:
    """What a step of one shape, (rows, tokens), reads and writes, and its graph."""

    def __init__(self, shape: tuple[int, int], like: list[tuple[Tensor, Tensor]]) -> None:
        self.shape = rows, tokens = shape
        device = like[0][0].device
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids, self.positions = torch.zeros((2, rows, 1), dtype=torch.int64, device=device)
        self.mask = torch.zeros((rows, 1, 1, tokens), dtype=torch.bool, device=device)
        self.layers = [
            _Slots(*(x.new_zeros((rows, x.shape[1], tokens, x.shape[3])) for x in pair), self.slot) for pair in like
        ]
        self.nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
        self.graph: Any = None
        self.logits = torch.empty(0)

    def fill(self, layers: list[tuple[Tensor, Tensor]], mask: Tensor, positions: Tensor) -> None:
        """Begin after the tokens that `layers` hold. Keys and values left in the room are finite, and masked."""
        rows, tokens = mask.shape[0], mask.shape[3]
        self.slot.fill_(tokens)
        self.ids.zero_()
        self.positions.zero_()
        self.positions[:rows] = positions
        self.mask.zero_()
        self.mask[:rows, ..., :tokens] = mask
        for mine, (keys, values) in zip(self.layers, layers, strict=True):
            mine.keys[:rows, :, :tokens] = keys
            mine.values[:rows, :, :tokens] = values


class _Slots(CacheLayerMixin):
    """Keys and values of one layer, with room: a step writes its token at `slot`. [R, heads, capacity, head dim]."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slot = keys, values, slot
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of every row; the unused room is masked."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(capacity, first slot)."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """The capacity; positions and the mask are always given."""
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        """The capacity."""
        return self.keys.shape[2]
