"""Noise from a cryptographic generator, and the public grid to which a noised sum is rounded.

Every reservation gets its own ChaCha20 key: 256 bits of the operating system's randomness mixed with the reservation
id (Bernstein 2008; Mironov 2012 on what low bits of floating-point noise betray). The key and the generator's state are
never stored, copied or carried into a forked process: two machines with one state would let noise cancel.

>>> NoiseSource.seeded(7, "r-1").normal(2).round(3)
array([0.288, 1.465])
"""

from __future__ import annotations

import hashlib
import os
from typing import NoReturn

import numpy as np
from randomgen import ChaCha

from common.errors import CloisterError, InvalidInput

GRID_BITS = 16
"""The grid's step is the largest power of two at or below the noise's standard deviation, divided by 2^16."""


class NoiseSource:
    """Independent streams of normal noise and of sampling randomness from one 256-bit key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise InvalidInput(f"a noise key has 32 bytes, got {len(key)}")
        self._noise = np.random.Generator(_cipher(key, b"noise"))
        self._sampling = np.random.Generator(_cipher(key, b"sampling"))
        self._process = os.getpid()

    @classmethod
    def fresh(cls, reservation_id: str) -> NoiseSource:
        """A source that nobody can reproduce: operating-system randomness mixed with the reservation id."""
        return cls(hashlib.sha256(b"cloister/noise/v1\0" + os.urandom(32) + reservation_id.encode()).digest())

    @classmethod
    def seeded(cls, seed: int, reservation_id: str) -> NoiseSource:
        """A reproducible source, for tests and for runs whose certificate says ``not private``."""
        return cls(hashlib.sha256(f"cloister/seeded/v1\0{seed}\0{reservation_id}".encode()).digest())

    def normal(self, size: int | tuple[int, ...]) -> np.ndarray:
        """Standard normal draws in float64.

        Raises:
            CloisterError: the process was forked after the source was made.
        """
        self._same_process()
        return self._noise.standard_normal(size)

    def generator(self) -> np.random.Generator:
        """The stream for the Poisson sampler; independent of the noise."""
        self._same_process()
        return self._sampling

    def _same_process(self) -> None:
        if os.getpid() != self._process:
            raise CloisterError("a noise source was carried into a forked process; make it after the fork")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a noise source is never stored or copied")


def _cipher(key: bytes, purpose: bytes) -> ChaCha:
    derived = hashlib.sha256(b"cloister/stream/v1\0" + purpose + b"\0" + key).digest()
    return ChaCha(key=int.from_bytes(derived, "little"), rounds=20)


def grid_step(noise_std: float | np.ndarray) -> np.ndarray:
    """The public grid's step for noise of standard deviation ``noise_std``: a power of two, about noise_std/65,536.

    It depends on σ, C and the declared batch size alone, so rounding to it is post-processing, and it hides the low
    bits through which float64 noise could betray the sum. It adds 2e-11 of the noise's variance.

    >>> float(grid_step(1.0)) == 2.0**-16
    True
    """
    return np.exp2(np.floor(np.log2(noise_std)) - GRID_BITS)
