"""Where every trainable parameter lies in one flat vector, and the arena of per-example gradient rows.

The order is that of ``model.named_parameters()``. A parameter is known by its offset, never by the identity of a
tensor: recomputation under gradient checkpointing replaces tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import InvalidInput

BLOCK = 1024
"""Row length is a multiple of this, so that norms take whole rows in whole blocks (``client/engine/clipping.py``)."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter's place: ``values[offset : offset + size]`` viewed as ``shape``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Layout:
    """Names, shapes and offsets of the trainable parameters of ``model``.

    Raises:
        InvalidInput: nothing is trainable, or the trainable parameters differ in device or dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not self.parameters:
            raise InvalidInput("the model has no trainable parameter; attach a LoRA adapter with requires_grad=True")
        self.slots: dict[str, Slot] = {}
        self._offset_of: dict[int, int] = {}
        offset = 0
        for name, parameter in self.parameters.items():
            self.slots[name] = Slot(name, tuple(parameter.shape), offset, parameter.numel())
            self._offset_of[id(parameter)] = offset
            offset += parameter.numel()
        self.num_parameters = offset
        self.device = _one_of(model, "device")
        self.dtype: torch.dtype = _one_dtype(self.parameters)

    def offset(self, parameter: nn.Parameter) -> int:
        """Offset of a trainable parameter object; a tied parameter has one offset for all its holders."""
        return self._offset_of[id(parameter)]

    def owns(self, parameter: Tensor | None) -> bool:
        """Whether ``parameter`` is trainable and therefore has a slot."""
        return parameter is not None and id(parameter) in self._offset_of

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy ``arrays`` into the parameters.

        Raises:
            InvalidInput: a name is missing or unknown, a shape differs, or a value is not finite; nothing is changed.
        """
        if set(arrays) != set(self.slots):
            odd = sorted(set(arrays) ^ set(self.slots))
            raise InvalidInput(f"adapter tensors differ from the model's trainable ones: {', '.join(odd[:3])}")
        for name, slot in self.slots.items():
            if tuple(arrays[name].shape) != slot.shape:
                raise InvalidInput(f"{name}: shape {tuple(arrays[name].shape)}, expected {slot.shape}")
            if not np.isfinite(arrays[name]).all():
                raise InvalidInput(f"{name}: holds a value that is not finite")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.as_tensor(np.ascontiguousarray(arrays[name])))

    def read(self) -> dict[str, np.ndarray]:
        """Float32 copies of the parameters."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in self.parameters.items()
        }

    def subtract(self, step: Tensor) -> None:
        """Subtract the flat ``step`` [P] from the parameters."""
        with torch.no_grad():
            for name, part in self.unflatten(step).items():
                parameter = self.parameters[name]
                parameter.sub_(part.to(parameter.device, parameter.dtype))

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of the flat ``vector`` [P] by name."""
        return {name: vector[s.offset : s.offset + s.size].view(s.shape) for name, s in self.slots.items()}


def arena_bytes(shapes: Iterable[tuple[int, ...]], *, itemsize: int = 4) -> int:
    """Arena bytes of one example for trainable tensors of these ``shapes``: what ``cloister plan`` prints.

    >>> arena_bytes([(8, 4096), (4096, 8)] * 64)   # rank 8 on query and value of a 7B model: 16 MiB
    16777216
    """
    return -(-sum(prod(shape) for shape in shapes) // BLOCK) * BLOCK * itemsize


class Arena:
    """Per-example gradient rows, float32 (float64 when the parameters are), reused by every micro-batch.

    A row is padded with zeros to a multiple of ``BLOCK``, so that norms are one pass over memory.
    """

    def __init__(self, layout: Layout) -> None:
        self.width = layout.num_parameters
        self.stride = -(-layout.num_parameters // BLOCK) * BLOCK
        self.dtype = torch.float64 if layout.dtype == torch.float64 else torch.float32
        self.device = layout.device
        self._buffer: Tensor | None = None
        self.rows = torch.empty(0, self.stride, dtype=self.dtype, device=self.device)
        self._written: set[int] = set()
        self._expected: dict[int, int] = {}

    @property
    def bytes_per_example(self) -> int:
        """Bytes that one more example in a micro-batch adds to the arena."""
        return arena_bytes([(self.width,)], itemsize=self.dtype.itemsize)

    def vector(self) -> Tensor:
        """A zero vector [stride], to sum rows into."""
        return torch.zeros(self.stride, dtype=self.dtype, device=self.device)

    def begin(self, count: int, slots: Mapping[str, Slot]) -> None:
        """Offer ``count`` rows for writing; what is not written by ``finish`` is zero."""
        if self._buffer is None or self._buffer.shape[0] < count:
            self._buffer = None
            self._buffer = torch.zeros(count, self.stride, dtype=self.dtype, device=self.device)
        self.rows = self._buffer[:count]
        self._written.clear()
        self._expected = {slot.offset: slot.size for slot in slots.values()}

    def view(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        """The rows' part for one parameter: [b, *shape], a view."""
        return self.rows[:, offset : offset + prod(shape)].view(self.rows.shape[0], *shape)

    def first(self, offset: int) -> bool:
        """True once per micro-batch and offset: the first call writes, later ones add."""
        if offset in self._written:
            return False
        self._written.add(offset)
        return True

    def finish(self) -> Tensor:
        """All rows [b, stride]; parameters that no site reached have gradient zero."""
        for offset, size in self._expected.items():
            if offset not in self._written:
                self.rows[:, offset : offset + size].zero_()
        return self.rows

    def release(self) -> None:
        """Give the memory back (after an out-of-memory error, or at the end of a run)."""
        self._buffer = None
        self.rows = torch.empty(0, self.stride, dtype=self.dtype, device=self.device)


def _one_of(model: nn.Module, what: str) -> torch.device:
    devices = {getattr(p, what): name for name, p in model.named_parameters()}
    if len(devices) > 1:
        listed = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise InvalidInput(f"the model is spread over several devices ({listed}); move it to one")
    return next(iter(devices))


def _one_dtype(parameters: Mapping[str, nn.Parameter]) -> torch.dtype:
    dtypes = {p.dtype: name for name, p in parameters.items()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        listed = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise InvalidInput(
            f"trainable parameters must share one floating dtype ({listed}); cast the adapter to float32"
        )
    return next(iter(dtypes))
