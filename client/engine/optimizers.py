"""SGD and Adam on noised gradients. They see only what was released, so their state costs no privacy; it never leaves.

An optimizer maps a flat gradient [P] to the step [P] that is subtracted from the parameters. ``forget`` deletes its
state at the end of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import InvalidInput


@dataclass
class Sgd:
    """Step = learning_rate · v with v ← momentum·v + gradient; momentum 0 is plain gradient descent."""

    learning_rate: float
    momentum: float = 0.0
    _velocity: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _positive(self.learning_rate)
        if not 0.0 <= self.momentum < 1.0:
            raise InvalidInput(f"momentum must be in [0, 1), got {self.momentum}")

    def __call__(self, gradient: Tensor) -> Tensor:
        """The step for ``gradient`` [P]."""
        if self.momentum == 0.0:
            return self.learning_rate * gradient
        old = torch.zeros_like(gradient) if self._velocity is None else self._velocity
        self._velocity = self.momentum * old + gradient
        return self.learning_rate * self._velocity

    def forget(self) -> None:
        """Delete the state."""
        self._velocity = None


@dataclass
class Adam:
    """Kingma and Ba 2015, Algorithm 1."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    _first: Tensor | None = field(default=None, init=False, repr=False)
    _second: Tensor | None = field(default=None, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        _positive(self.learning_rate)
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0 and self.epsilon > 0.0):
            raise InvalidInput(
                f"Adam needs betas in [0, 1) and epsilon > 0, got {self.beta1}, {self.beta2}, {self.epsilon}"
            )

    def __call__(self, gradient: Tensor) -> Tensor:
        """The step for ``gradient`` [P]."""
        if self._first is None or self._second is None:
            self._first, self._second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self._count += 1
        self._first.mul_(self.beta1).add_(gradient, alpha=1.0 - self.beta1)
        self._second.mul_(self.beta2).addcmul_(gradient, gradient, value=1.0 - self.beta2)
        corrected = self._first / (1.0 - self.beta1**self._count)
        scale = (self._second / (1.0 - self.beta2**self._count)).sqrt_().add_(self.epsilon)
        return self.learning_rate * corrected / scale

    def forget(self) -> None:
        """Delete the state."""
        self._first = self._second = None
        self._count = 0


def _positive(learning_rate: float) -> None:
    if not 0.0 < learning_rate < float("inf"):
        raise InvalidInput(f"learning_rate must be > 0 and finite, got {learning_rate}")
