"""Decoding steps of fixed shape, replayed as a CUDA graph: a token costs what its kernels take, not their launches.

    prefill (eager) ──► keys, values and mask with room for more tokens ──► captured once ──► replayed for every token
    the room is used up, or half of the rows have finished ──► moved to other buffers and captured again

Shapes are those of the buffers, so rows that have finished compute on, unread, until `keep` drops them. Only for models
whose every layer has full attention by SDPA: see `fits`. Without a GPU the same steps run uncaptured.

Tests: tests/recipes/decoding/test_fixed_step.py.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from tw_recipes import _compat

ROOM = 256
"""Tokens that buffers grow by. A capture takes about as long as two steps without a graph."""


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


class FixedStep:
    """The next token of every row of a batch, again and again.

    Args:
        model: A causal language model, see `fits`.
        cache: Prefilled, R rows, S tokens, see `holds`. It is not needed afterwards.
        mask: Which of the S tokens a row may see. int64[R, S], 1 or 0.
        positions: Position of each row's next token. int64[R, 1].
        room: Tokens that buffers grow by.
    """

    def __init__(self, model: Any, cache: DynamicCache, mask: Tensor, positions: Tensor, *, room: int = ROOM) -> None:
        self.model, self.room = model, room
        self.cache_name = _compat.cache_argument(model)
        self.length = mask.shape[1]
        self.captures = positions.device.type == "cuda"
        self.slot = torch.tensor([self.length], device=positions.device)
        self.positions = positions.clone()
        self.ids = torch.zeros_like(positions)
        self.mask = mask.bool()[:, None, None, :]
        self.layers = [_Slots(layer.keys, layer.values, self.slot) for layer in cache.layers]
        self.graph: Any = None
        self.logits = torch.empty(0)
        self._grow()

    @property
    def rows(self) -> int:
        """Rows of the batch, finished ones that were not dropped included."""
        return self.ids.shape[0]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of each row's next token; they are overwritten by the next call.

        Args:
            tokens: The last token of each row. int64[R].

        Returns:
            [R, vocabulary], in the type of the model.
        """
        if self.length == self.mask.shape[-1]:
            self._grow()
        self.ids.copy_(tokens[:, None])
        if self.captures and self.graph is None:
            self._capture()
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        self.length += 1
        return self.logits

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows. int64[K]."""
        self.graph = None
        self.ids, self.positions, self.mask = self.ids[rows], self.positions[rows], self.mask[rows]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def _grow(self) -> None:
        self.graph = None
        self.mask = torch.nn.functional.pad(self.mask, (0, self.room))
        for layer in self.layers:
            layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, 0, self.room))
            layer.values = torch.nn.functional.pad(layer.values, (0, 0, 0, self.room))

    def _forward(self) -> Tensor:
        self.mask.index_fill_(3, self.slot, True)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,  # four dimensions: taken as it is by every layer
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: Cache(layers=list(self.layers))},
        )
        self.positions.add_(1)
        self.slot.add_(1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _capture(self) -> None:
        """Capture a step; where that fails, say why once and run without a graph from here on."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()  # libraries set themselves up outside the capture; it writes what the step itself will
            self.positions.sub_(1)
            self.slot.sub_(1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._forward()
        except RuntimeError as error:
            self.captures = False
            message = str(error).partition("\n")[0]
            warnings.warn(f"decoding runs without CUDA graphs: {type(self.model).__name__}: {message}", stacklevel=2)
        else:
            self.graph = graph


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
