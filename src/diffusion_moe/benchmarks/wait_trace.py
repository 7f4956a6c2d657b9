"""Places where the host waits for the device: on a GPU by torch's own warnings, without one on a stand-in.

The stand-in is torch's meta device. Its tensors have no values, so whatever reads one shows, and a copy from or to the
CPU shows as an operator. The trace answers such a read with a made-up value, and goes on.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .counting import SYNC_WARNING

Kind = Literal["scalar read", "data-dependent shape", "copy to the device", "copy to the host", "synchronization"]
CPU = torch.device("cpu")
STAND_IN = torch.device("meta")
PACKAGE = Path(__file__).parent.parent
OTHERS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Folders of Python's own modules and of installed packages, torch among them."""


class Wait(NamedTuple):
    """One wait of the host for the device."""

    kind: Kind
    """`synchronization` is what torch reports on a GPU, which may be any of the others."""
    file: str
    """File of the line that waits: relative to the folder of the package, else absolute."""
    line: int

    @classmethod
    def here(cls, kind: Kind) -> Wait:
        """A wait at `position`."""
        return cls(kind, *position())


def position() -> tuple[str, int]:
    """File and line of the innermost call that is neither in an installed package nor in this module."""
    frame = sys._getframe()
    while not _is_ours(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(PACKAGE):
        path = path.relative_to(PACKAGE.parent)
    return path.as_posix(), frame.f_lineno


def _is_ours(file: str) -> bool:
    if file.startswith(f"{PACKAGE}{os.sep}"):
        return file != __file__
    return not file.startswith((*OTHERS, "<"))


class Device(Protocol):
    """A device whose waits can be listed."""

    device: torch.device

    def trace(self) -> AbstractContextManager[list[Wait]]:
        """A context with the list that its waits are added to. Memory pinned in one is pinned in the next."""


class Gpu:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def trace(self) -> Iterator[list[Wait]]:
        """See `Device.trace`: torch warns at each synchronization."""
        waits: list[Wait] = []

        def note(message: Any, *_: Any, **__: Any) -> None:
            if SYNC_WARNING in str(message):
                waits.append(Wait.here("synchronization"))

        torch.cuda.synchronize(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                # Torch does not report copies of memory that is not pinned, if they are asked not to block.
                with _Copies(waits, "cuda", Tensor.is_pinned, only_unreported=True):
                    yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")


class StandIn:
    """Torch's meta device in place of a GPU. Inside `trace` its tensors cannot be mixed with the CPU's."""

    def __init__(self) -> None:
        self.device = STAND_IN
        self.pinned: dict[int, torch.UntypedStorage] = {}
        """Storages that count as pinned, by address."""

    @contextmanager
    def trace(self) -> Iterator[list[Wait]]:
        waits: list[Wait] = []
        with _Operators(waits, self), _Functions(waits, self):
            yield waits

    def pin(self, tensor: Tensor) -> Tensor:
        """Mark the memory of a CPU tensor as pinned, which CPU-only builds of torch cannot do."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """True for a tensor in pinned memory, views included."""
        return tensor.untyped_storage().data_ptr() in self.pinned


class _Copies(TorchDispatchMode):
    """Adds copies between the CPU and a device that block the host.

    Args:
        device: type of the device.
        is_pinned: true for CPU tensors in pinned memory.
        only_unreported: leave out copies that torch reports itself.
    """

    def __init__(
        self, waits: list[Wait], device: str, is_pinned: Callable[[Tensor], bool], only_unreported: bool = False
    ) -> None:
        super().__init__()
        self.waits, self.device, self.is_pinned = waits, device, is_pinned
        self.only_unreported = only_unreported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note_copy(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def note_copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Kind | None:
        """The direction of a copy between host and device, which is noted if it blocks; None for other operators."""
        if func.overloadpacket is torch.ops.aten.copy_:
            target, source, *rest = args
            asked = bool(rest[0]) if rest else bool(kwargs.get("non_blocking"))
            device, dtype, host = target.device, target.dtype, source if target.device.type == self.device else target
        elif func.overloadpacket is torch.ops.aten._to_copy:
            source = args[0]
            asked = bool(kwargs.get("non_blocking"))
            device, dtype = torch.device(kwargs.get("device") or source.device), kwargs.get("dtype") or source.dtype
            host = None if device.type == "cpu" else source  # torch makes a pinned target
        else:
            return None
        if {source.device.type, device.type} != {"cpu", self.device}:
            return None
        kind: Kind = "copy to the host" if device.type == "cpu" else "copy to the device"
        # A cast and a strided copy go through memory of torch's own that is not pinned.
        direct = dtype == source.dtype and (host is None or (_is_dense(host) and self.is_pinned(host)))
        if (not asked and not self.only_unreported) or (asked and not direct):
            self.waits.append(Wait.here(kind))
        return kind


def _is_dense(tensor: Tensor) -> bool:
    """True if the elements fill one block of memory."""
    return tensor.stride() == torch.empty_like(tensor, device=STAND_IN).stride()


class _Operators(_Copies):
    """Adds the waits of operators on the stand-in, answers reads of values, and refuses mixed devices."""

    def __init__(self, waits: list[Wait], stand_in: StandIn) -> None:
        super().__init__(waits, STAND_IN.type, stand_in.is_pinned)
        self.stand_in = stand_in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if tensor.is_meta]
        direction = self.note_copy(func, args, kwargs)
        if direction == "copy to the host":
            return self._host_copy(func, args, kwargs)
        if direction or not on_device:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            return self._index(func, args, kwargs)
        if len(on_device) < len(tensors):
            _refuse_mixed(func, tensors)
        if name in BITWISE and all(x.dtype == torch.int64 and x.shape == tensors[0].shape for x in tensors):
            return torch.empty_like(tensors[0])
        if name in READS:
            self.waits.append(Wait.here("scalar read"))
            return READS[name](*args)
        if torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
            self.waits.append(Wait.here("data-dependent shape"))
            if name not in SHAPES:
                raise NotImplementedError(f"no stand-in answers {func} at {_here()}; trace it on a GPU")
            return SHAPES[name](*args)
        return func(*args, **kwargs)

    def _host_copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Zeros in place of a device's values."""
        if func.overloadpacket is torch.ops.aten.copy_:
            return args[0].zero_()
        return self.stand_in.pin(torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype))

    def _index(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Indexing: indices may be on the CPU and are copied; a mask becomes the indices of its true values."""
        target, indices, *values = args
        if not target.is_meta:
            _refuse_mixed(func, [target, *(index for index in indices if index is not None)])
        for other in (*indices, *values):
            if isinstance(other, Tensor) and not other.is_meta:
                self.waits.append(Wait.here("copy to the device"))
        if not any(_is_mask(index) for index in indices):
            return func(*args, **kwargs)
        if not (values and len(indices) == 1 and values[0].numel() == 1):  # one number for a mask is a kernel
            self.waits.append(Wait.here("data-dependent shape"))
        if values:
            return target if func._schema.is_mutable else torch.empty_like(target)
        positions: list[Tensor | None] = []
        for index in indices:
            one = target.new_empty(index.numel(), dtype=torch.int64) if _is_mask(index) else index
            positions += [one] * (index.ndim if _is_mask(index) else 1)
        return func(target, positions)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _refuse_mixed(func: Any, tensors: list[Tensor]) -> None:
    """Refuse CPU tensors among those of a device, as a GPU does; a pointwise kernel takes scalars of the CPU."""
    host = [tensor for tensor in tensors if not tensor.is_meta]
    if torch.Tag.pointwise in func.tags and all(tensor.ndim == 0 for tensor in host):
        return
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in host)
    raise RuntimeError(
        f"{func} mixes devices at {_here()}: a tensor on the CPU of shape {shapes} among those on the device; "
        "move it there"
    )


def _here() -> str:
    file, line = position()
    return f"{file}:{line}"


def _scalar(x: Tensor) -> bool | int | float:
    """A value in place of the one on the device: true, or one."""
    if x.dtype == torch.bool:
        return True
    return 1.0 if x.is_floating_point() else 1


def _unique(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.numel()), x.new_empty(x.shape, dtype=torch.int64), x.new_empty(x.numel(), dtype=torch.int64)


READS: dict[str, Callable[..., Any]] = {"_local_scalar_dense": _scalar, "equal": lambda x, y: True}
"""Operators that return a value to the host, with what the stand-in returns."""
SHAPES: dict[str, Callable[..., Any]] = {
    "nonzero": lambda x: x.new_empty(x.numel(), x.ndim, dtype=torch.int64),
    "masked_select": lambda x, mask: x.new_empty(torch.broadcast_shapes(x.shape, mask.shape).numel()),
    "bincount": lambda x, weights=None, minlength=0: x.new_empty(max(1, minlength)),
    "repeat_interleave": lambda repeats: repeats.new_empty(repeats.numel()),
    "_unique2": _unique,
    "unique_consecutive": _unique,
}
"""Operators whose result has a shape that depends on values, with results of the largest shape (or of ones)."""
BITWISE = ("bitwise_and", "bitwise_xor", "__rshift__")
"""Operators of the random numbers, a third of all: answered here, because torch takes half a millisecond for each."""
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""Functions that copy Python's or numpy's values to a device."""
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class _Functions(TorchFunctionMode):
    """Adds copies that the meta device leaves out, those of values from Python, and pins memory by a mark."""

    def __init__(self, waits: list[Wait], stand_in: StandIn) -> None:
        super().__init__()
        self.waits, self.stand_in = waits, stand_in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return self.stand_in.pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self.stand_in.is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return self.stand_in.pin(func(*args, **kwargs))
        if func in INDEXING and args[0].is_meta and _has_lists(args[1]):
            self.waits.append(Wait.here("copy to the device"))
        out = func(*args, **kwargs)
        # new_tensor is given the values after the tensor.
        if func in FROM_HOST and out.is_meta and not isinstance(args[func is Tensor.new_tensor], Tensor):
            self.waits.append(Wait.here("copy to the device"))
        return out


def _has_lists(index: Any) -> bool:
    """True for an index with lists, which torch copies to the device; arrays show as tensors of the CPU."""
    return any(isinstance(part, list | range) for part in (index if isinstance(index, tuple) else (index,)))
