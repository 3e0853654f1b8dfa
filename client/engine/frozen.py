"""The frozen layers below the first trained one, run once per record instead of once per draw.

What enters the first trained block of a transformer is a function of the record alone: every block below it is frozen,
dropout there is off, and no layer lets records touch each other (``client/engine/discovery.py`` refuses those). So it
can be kept. A step then runs the kept state through the rest of the model. The gradients are those of the whole forward
pass, up to the rounding that another batch shape brings; the self-test compares them on made-up tokens before a record
is read.

Kept states are as private as the records they came from, and reveal them. They stay in the trainer's memory, are
written nowhere and leave in no message. They are computed for every record before the first round, so that the time of
a step does not tell which records were drawn before.

It pays where a record is drawn more than once: rounds × local steps × sample rate > 1. It needs tokens × width × 4
bytes of memory (2 in bf16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.engine.batches import Batch, Example
from client.engine.stock import evaluating, put_back
from common.errors import InvalidInput


@dataclass
class FrozenStates:
    """States by what computed them (backbone, depth, precision) and by the tokens that they came from.

    One is made per process; runs of one process on the same backbone may share it, because seeds, silos and adapters
    play no part below the first trained block.
    """

    _kept: dict[tuple[str, ...], dict[bytes, Tensor]] = field(default_factory=dict, repr=False)

    def of(self, *identity: str) -> dict[bytes, Tensor]:
        """The states that ``identity`` computed, by ``key_of`` their tokens; tensors [T, width] on the CPU."""
        return self._kept.setdefault(identity, {})


class FrozenBlocks:
    """The blocks of ``model`` below the first that holds a trainable parameter.

    Args:
        model: a PeftModel whose trainable parameters are set.
        kept: where states are remembered; see ``FrozenStates.of``.

    Attributes:
        depth: how many blocks are skipped.

    Raises:
        InvalidInput: the first block is trained, or the model's blocks are not a plain chain.
    """

    def __init__(self, model: nn.Module, kept: Callable[[int], dict[bytes, Tensor]]) -> None:
        self.model = model
        blocks = transformer_blocks(model)
        trained = (i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
        self.depth = next(trained, len(blocks))
        if self.depth == 0:
            raise InvalidInput(
                "cache-frozen-layers: the first layer of this model is trained, so none can be kept; leave it out, or "
                "name later layers in --target-modules"
            )
        self._skipped = list(blocks[: self.depth])
        self._kept = kept(self.depth)
        self._wrapped = False
        """Whether a block returns its state inside a tuple, as older transformers do."""

    def __len__(self) -> int:
        return len(self._kept)

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Those whose state is not kept yet, each once."""
        return list({key: e for e in examples if (key := key_of(e)) not in self._kept}.values())

    def forget(self, examples: Sequence[Example]) -> None:
        """Delete what is kept of ``examples``."""
        for example in examples:
            self._kept.pop(key_of(example), None)

    @torch.no_grad()
    def remember(self, examples: Sequence[Example], batch: Batch) -> None:
        """Compute and keep the states of ``examples``, which ``batch`` holds padded on the right."""
        for example, state in zip(examples, self._below(batch), strict=True):
            self._kept[key_of(example)] = state[: len(example.input_ids)].to("cpu", copy=True)

    def recall(self, examples: Sequence[Example], device: torch.device) -> Tensor | None:
        """States [b, T, width], zero where padded; None unless all of them are kept."""
        found = [self._kept.get(key_of(example)) for example in examples]
        states = [one for one in found if one is not None]
        if not states or len(states) < len(found):
            return None
        return nn.utils.rnn.pad_sequence(states, batch_first=True).to(device)

    @contextmanager
    def skipped(self, states: Tensor) -> Iterator[None]:
        """While open, a forward pass takes ``states`` for what enters the first trained block."""
        with ExitStack() as stack:
            for block in self._skipped:
                stack.callback(put_back, block, block.__dict__.get("forward"))
                given = states if block is self._skipped[-1] else None
                block.forward = partial(_pass_on, given, self._wrapped)
            yield

    def _below(self, batch: Batch) -> Tensor:
        caught: list[Tensor] = []

        def catch(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._wrapped = isinstance(output, tuple)
            state = output[0] if self._wrapped else output
            if not isinstance(state, Tensor) or state.ndim != 3 or (self._wrapped and len(output) > 1):
                raise InvalidInput(
                    "cache-frozen-layers: the layers of this model hand on more than one state; leave it out"
                )
            caught.append(state)
            raise _Enough

        handle = self._skipped[-1].register_forward_hook(catch)
        try:
            with evaluating(self.model), suppress(_Enough):
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        finally:
            handle.remove()
        if not caught:
            raise InvalidInput("cache-frozen-layers: the layers of this model are not reached; leave it out")
        return caught[0]


class _Enough(Exception):
    """What lies above is not needed."""


def key_of(example: Example) -> bytes:
    """The tokens themselves: the only thing of a record that the layers below see."""
    return np.asarray(example.input_ids, dtype=np.int64).tobytes()


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The chain of blocks of an encoder or a decoder.

    Raises:
        InvalidInput: there is none, or more than one, of the length that the configuration says.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count and len(m) > 0]
    if len(found) != 1:
        raise InvalidInput(
            f"cache-frozen-layers: {len(found)} chains of {count} layers in this model, one is needed; leave it out"
        )
    return found[0]


def _pass_on(given: Tensor | None, wrapped: bool, *args: Any, **named: Any) -> Any:
    """A skipped block: hands on what it got, or, the last of them, the kept states."""
    state = given if given is not None else (args[0] if args else named["hidden_states"])
    return (state,) if wrapped else state
