"""Dropout whose masks belong to the record: no neighbour, padding or recomputation changes them.

One stream of masks for a whole batch would let one record's presence change every other record's mask (DESIGN §4.11).
Here each mask entry is a hash of (this step's secret, the record, the layer, the entry's coordinates): the finaliser of
SplitMix64 (Steele, Lea, Flood 2014), ample for dropout and never used for noise. Coordinates, not a running index, are
hashed, so padding to another length leaves a record's mask as it was, and a checkpoint's second pass draws it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from client.engine.batches import Example

_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64
_STEP = 0x9E3779B97F4A7C15 - 2**64


def record_seeds(secret: bytes, examples: Sequence[Example], device: torch.device) -> Tensor:
    """One 64-bit seed per record [b], from the step's secret and the record's own tokens."""
    seeds = [_number(secret + np.asarray(example.input_ids, dtype=np.int64).tobytes()) for example in examples]
    return torch.tensor(seeds, dtype=torch.int64, device=device)


def keep_mask(seeds: Tensor, layer: str, rate: float, shape: Sequence[int]) -> Tensor:
    """Boolean mask of ``shape`` [b, ...]: each entry is True with probability 1 − rate."""
    site = _number(layer.encode())
    value = _mix(seeds ^ site).view(-1, *[1] * (len(shape) - 1))
    for axis, size in enumerate(shape[1:], start=1):
        place = torch.arange(1, size + 1, dtype=torch.int64, device=seeds.device) * _STEP
        value = _mix(value + place.view(-1, *[1] * (len(shape) - 1 - axis)))
    uniform = _shift(value, 11).to(torch.float64) * 2.0**-53
    return uniform >= rate


def dropped(x: Tensor, seeds: Tensor, layer: str, rate: float, length: int) -> Tensor:
    """``x`` with dropout: kept entries are divided by 1 − rate. x [b, ...] or flattened [b·length, features]."""
    b = seeds.shape[0]
    shape = x.shape if x.shape[0] == b else torch.Size((b, length, *x.shape[1:]))
    mask = keep_mask(seeds, layer, rate, shape).view(x.shape)
    return x * (mask.to(x.dtype) / (1.0 - rate))


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of 64-bit integers."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _MULTIPLY_1
    value = (value ^ _shift(value, 27)) * _MULTIPLY_2
    return value ^ _shift(value, 31)
