"""What both peers are given: the same data, split, backbone, adapter, kept states and evaluation as our own runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from client.engine import Example, FrozenStates
from client.engine.batches import Batch, micro_batches
from client.evaluator import Evaluator
from common.config import RunConfig
from deploy.inputs import classes_of, gather, tokenise, tokenise_silos
from deploy.simulation.simulate import set_environment
from deploy.workshop import Workshop, open_workshop, set_threads


@dataclass(frozen=True)
class Setting:
    """A loaded model, each silo's examples, and the public evaluation."""

    workshop: Workshop
    silos: dict[str, Sequence[Example]]
    evaluator: Evaluator

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained ones."""
        return [p for p in self.workshop.model.parameters() if p.requires_grad]

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        """Physical micro-batches of similar length, with the kept states of the frozen layers."""
        engine = self.workshop.workbench.engine
        return [engine.batch(group) for group in micro_batches(examples, engine.bounds)]

    def logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """``model``'s logits [b, classes], the frozen layers skipped."""
        frozen = self.workshop.workbench.engine.source.frozen
        if frozen is None or batch.states is None:
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        with frozen.skipped(batch.states):
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    def scores(self) -> tuple[float, float]:
        """Accuracy and loss of the model as it stands."""
        found = self.evaluator.current()
        return found.score, found.loss


def prepare(config: RunConfig, states: FrozenStates) -> Setting:
    """Load everything that ``config`` names."""
    set_environment()
    set_threads(config.threads)
    inputs = gather(config)
    classes = classes_of(config, inputs)
    workshop = open_workshop(config, classes, states=states)
    prepared = tokenise_silos(config, inputs.silos, workshop.tokenizer, workshop.max_length, classes)
    silos = {name: one.examples for name, one in prepared.items()}
    for examples in silos.values():
        workshop.workbench.engine.prepare(examples)
    public = tokenise(config, inputs.evaluation, workshop.tokenizer, workshop.max_length, classes).examples
    return Setting(workshop, silos, Evaluator(workshop.model, public, pad_token_id=workshop.tokenizer.pad_token_id))
