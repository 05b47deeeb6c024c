"""Run a warp-specialised Gluon kernel on the CPU, one Python thread a partition: for its arithmetic and its barriers.

Gluon has no interpreter. Here the kernel's own Python source runs with stand-ins for the names it uses. What the chip
does late happens as late as the kernel allows: a wgmma reads its operands when it is waited for, a bulk store when its
group is waited for; a bulk load writes at once. So a buffer released or reused early shows as a wrong number, memory
never written as NaN, and a barrier that nobody completes raises instead of hanging. Layouts, swizzles and registers are
not modelled: those are the compiler's (test_hopper_compile.py) and the GPU's (test_hopper.py).
"""

from __future__ import annotations

import threading
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PATIENCE = 30.0  # seconds that a barrier may stay incomplete


class Deadlock(RuntimeError):
    """A barrier was waited for that nobody completed."""


class Barrier:
    """An mbarrier: arrivals and bytes still missing, and how many phases are complete."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phases = 0

    def index(self, i: Any) -> Barrier:
        assert int(i) == 0
        return self

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def update(self, arrivals: int = 0, more_bytes: int = 0) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += more_bytes
            assert self.missing >= 0, "more arrivals than the barrier was made for"
            if self.missing == 0 and self.bytes == 0:
                self.phases += 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phases % 2 != parity, PATIENCE):
                raise Deadlock(f"phase {self.phases}: {self.missing} arrivals and {self.bytes} bytes are missing")


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> Any:
        part = self.data[int(i)]
        return part if isinstance(part, Barrier) else Shared(part)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, _layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.data.dtype
        assert value.shape == self.data.shape
        self.data.copy_(value)


@dataclass
class Pointer:
    """A tensor's elements from an offset on, or many such."""

    data: Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.data, self.offset + more)

    def __sub__(self, less: Any) -> Pointer:
        return self + (-less)


class Descriptor:
    """A tensor descriptor on the device."""

    def __init__(self, host: Any) -> None:
        self.view = host.base.as_strided(host.shape, host.strides)
        self.block, self.layout, self.dtype = host.block_shape, host.layout, host.base.dtype
        size = host.base.element_size()
        for block in host.block_shape:
            size *= block
        self.block_type = types.SimpleNamespace(nbytes=size)

    def ranges(self, start: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a tile that exists, in the tensor and in the tile."""
        there, here = [], []
        for first, block, size in zip(map(int, start), self.block, self.view.shape, strict=True):
            kept = max(0, min(block, size - first))
            there.append(slice(first, first + kept))
            here.append(slice(0, kept))
        return tuple(there), tuple(here)


@dataclass
class Product:
    """A wgmma in flight."""

    a: Any
    b: Shared
    acc: Any
    use_acc: bool
    value: Tensor | None = None

    def run(self) -> None:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        product = a.float() @ self.b.data.float()
        if self.use_acc:
            earlier = self.acc.value if isinstance(self.acc, Product) else self.acc
            assert earlier is not None
            product = product + earlier
        self.value = product


@dataclass
class Partition(threading.local):
    """What one group of warps has in flight."""

    products: deque[Product] = field(default_factory=deque)
    stores: deque[Callable[[], None]] = field(default_factory=deque)


class Emulator:
    """Stand-in for a Gluon kernel: `Emulator(kernel)[grid](*args, **constexprs)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.flight = Partition()
        self.lock = threading.Lock()
        self.program = (0, 1)
        self.namespace = self._namespace()
        self.translated: dict[Any, Callable[..., Any]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **constexprs: Any) -> None:
            body = self.translate(self.kernel)
            for program in range(grid[0]):
                self.program = (program, grid[0])
                body(*map(self._argument, args), **constexprs)

        return launch

    def _argument(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return Pointer(x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,)))
        if hasattr(x, "block_shape"):
            return Descriptor(x)
        return torch.tensor(x, dtype=torch.int32) if isinstance(x, int) else x

    def translate(self, function: Any) -> Callable[..., Any]:
        """The Python function behind a jitted one, with our stand-ins for its globals."""
        python = function.fn
        if python not in self.translated:
            names: dict[str, Any] = {}
            made = types.FunctionType(python.__code__, names, python.__name__, python.__defaults__, python.__closure__)
            self.translated[python] = made
            for name in python.__code__.co_names:
                if name in python.__globals__:
                    names[name] = self._global(name, python.__globals__[name])
        return self.translated[python]

    def _global(self, name: str, value: Any) -> Any:
        if name in self.namespace:
            return self.namespace[name]
        if hasattr(value, "fn"):
            return self.translate(value)
        return getattr(value, "value", value)  # a constexpr

    # ------------------------------------------------------------------------------------------------- stand-ins

    def _namespace(self) -> dict[str, Any]:
        language = types.SimpleNamespace(
            **{name: getattr(self, name) for name in dir(self) if not name.startswith("_")},
            **{f"{kind}{bits}": getattr(torch, f"{kind}{bits}") for kind in ("int", "float") for bits in (32, 64)},
            constexpr=None,
            exp2=torch.exp2,
            log2=torch.log2,
            static_range=range,
            sum=lambda x, axis: x.sum(axis).to(x.dtype),
            max=lambda x, axis: x.amax(axis),
            num_warps=lambda: 4,
            **dict.fromkeys(
                ["BlockedLayout", "NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "SwizzledSharedLayout"],
                lambda *args: None,
            ),
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *args: None),
        )
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda bar, count: bar.init(count),
            arrive=lambda bar, count: bar.update(arrivals=count),
            wait=lambda bar, parity: bar.wait(int(parity)),
            expect=lambda bar, size: bar.update(arrivals=1, more_bytes=size),
        )
        names = ("tma_load", "tma_store", "tma_add", "tma_store_wait", "warpgroup_mma", "warpgroup_mma_wait")
        plain = {name: getattr(self, name) for name in (*names, "as_tiles")}
        return {"gl": language, "tl": language, "mbarrier": mbarrier, "fence_async_shared": lambda: None, **plain}

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], _layout: Any) -> Any:
        if dtype == torch.int64:
            return Barrier() if shape == [1] else Shared([Barrier() for _ in range(shape[0])])
        unset = float("nan") if dtype.is_floating_point else -(2**30)
        return Shared(torch.full(shape, unset, dtype=dtype))

    def as_tiles(self, smem: Shared, shape: list[int], _layout: Any) -> Shared:
        return Shared(smem.data.view(shape))

    def warp_specialize(self, partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], regs: list[int]) -> None:
        assert len(partitions) == len(warps) + 1 == len(regs) + 1
        failures: list[BaseException] = []

        def run(function: Any, args: tuple[Any, ...]) -> None:
            try:
                with torch.no_grad():  # a thread does not inherit it from autograd
                    function(*args)
                assert not self.flight.products, "left without waiting for a product"
                assert not self.flight.stores, "left without waiting for a store"
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise min(failures, key=lambda error: isinstance(error, Deadlock))

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self.program[axis and 0], dtype=torch.int32)

    def num_programs(self, axis: int) -> Tensor:
        return torch.tensor(self.program[1], dtype=torch.int32)

    def arange(self, start: int, stop: int, _layout: Any = None) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int32)

    def zeros(self, shape: list[int], dtype: torch.dtype, _layout: Any = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def full(self, shape: list[int], value: Any, dtype: torch.dtype, _layout: Any = None) -> Tensor:
        return torch.full(shape, float(value) if dtype.is_floating_point else int(value), dtype=dtype)

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        if isinstance(yes, Pointer):
            return yes if condition else no
        return torch.where(torch.as_tensor(condition), yes, no)

    def maximum(self, a: Any, b: Any) -> Tensor:
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    def convert_layout(self, x: Tensor, _layout: Any, assert_trivial: bool) -> Tensor:
        return x

    def load(self, pointer: Pointer, mask: Any = True, other: Any = 0) -> Tensor:
        offset, mask = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask))
        return torch.where(mask, pointer.data[torch.where(mask, offset, 0).long()], other)

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        pointer.data[pointer.offset[mask].long()] = value[mask]

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> Tensor:
        with self.lock:
            before = pointer.data[pointer.offset].clone()
            pointer.data[pointer.offset] += value
        return before

    def tma_load(self, source: Descriptor, start: list[Any], bar: Barrier, target: Shared) -> None:
        there, here = source.ranges(start)
        target.data.zero_()
        target.data[here] = source.view[there]
        bar.update(more_bytes=-source.block_type.nbytes)

    def tma_store(self, target: Descriptor, start: list[Any], source: Shared) -> None:
        there, here = target.ranges(start)
        self.flight.stores.append(lambda: target.view[there].copy_(source.data[here]))

    def tma_add(self, target: Descriptor, start: list[Any], source: Shared) -> None:
        there, here = target.ranges(start)

        def add() -> None:
            with self.lock:
                target.view[there].add_(source.data[here])

        self.flight.stores.append(add)

    def tma_store_wait(self, pending: int) -> None:
        while len(self.flight.stores) > pending:
            self.flight.stores.popleft()()

    def warpgroup_mma(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        assert is_async
        self.flight.products.append(Product(a, b, acc, use_acc))
        return self.flight.products[-1]

    def warpgroup_mma_wait(self, outstanding: int, deps: list[Any]) -> Any:
        while len(self.flight.products) > outstanding:
            self.flight.products.popleft().run()
        values = [x.value if isinstance(x, Product) else x for x in deps]
        assert all(value is not None for value in values), "waited for too few products"
        return values[0] if len(values) == 1 else tuple(values)
