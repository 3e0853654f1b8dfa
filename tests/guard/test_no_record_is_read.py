"""The real trainer under a lying coordinator: counted by the records themselves, none is read."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from client.trainer import Trainer
from common.mechanism import Mechanism
from common.messages import Refusal, RefusalReason, Status, StatusCode
from common.recipe import recipe_hash

SHAPES = {"a.lora_B": (4, 2), "b.lora_B": (3, 2)}


class Records(Sequence):
    """Counts every look at them, at their number too."""

    def __init__(self):
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        raise IndexError(index)

    def __len__(self):
        self.reads += 1
        return 1000


RECIPE = {"rank": "8"}


class Untouched:
    """An engine that nobody may ask for anything."""

    def __getattr__(self, name):
        raise AssertionError(f"the engine was asked for {name}")


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def trainer(guard, records):
    initial = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    return Trainer(
        name="clinic-a",
        dataset="notes",
        examples=records,
        declared_records=1000,
        workbench=SimpleNamespace(engine=Untouched(), backbone_hash="b" * 64, initial=initial, recipe=RECIPE),
        guard=guard,
        public_key=guard.public_key,
    )


def test_a_signed_lie_reads_no_record(parties, trainer, records, lie):
    changes, reason = lie
    answer = trainer.train(parties.request(**{"recipe_hash": recipe_hash(RECIPE)} | changes))
    assert isinstance(answer, Refusal)
    assert answer.reason is reason
    assert records.reads == 0


@pytest.mark.parametrize("named", ["", recipe_hash({"rank": "4"})])
def test_a_plan_for_another_recipe_is_given_back_and_reads_no_record(parties, trainer, records, named):
    answer = trainer.train(parties.request(recipe_hash=named))
    assert isinstance(answer, Refusal)
    assert answer.reason is RefusalReason.RECIPE
    assert answer.voiding
    assert records.reads == 0


@pytest.mark.parametrize(
    "changes", [{"aggregation": "fedavg"}, {"mechanism": Mechanism(noise_allocation="min-energy")}], ids=str
)
def test_a_plan_that_contradicts_the_recipe_it_names_is_given_back_and_reads_no_record(
    parties, trainer, records, changes
):
    """It would train other tensors than its word for the policy says, or fail after it had started."""
    trainer._workbench.recipe = {"aggregation": "ffa", "subspace": "random"}
    named = recipe_hash(trainer._workbench.recipe)
    answer = trainer.train(parties.request(recipe_hash=named, **changes))
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.voiding) == (RefusalReason.RECIPE, True)
    assert records.reads == 0


def test_what_a_relay_alters_or_replays_reads_no_record(parties, trainer, records, change):
    good = parties.request()
    adapter = {name: np.full(array.shape, np.inf, np.float32) for name, array in good.adapter.items()}
    unsigned = replace(good, plan=replace(good.plan, server_round=2))
    for request in (replace(good, plan_signature=""), unsigned, replace(good, adapter=adapter)):
        assert isinstance(trainer.train(request), Refusal)
    assert isinstance(trainer.train(change(good, parties, learning_rate=0.5)), Refusal)
    assert records.reads == 0


def test_describing_itself_reads_no_record(trainer, records):
    assert trainer.describe().declared_records == 1000
    assert records.reads == 0


def test_after_the_guards_yes_a_fault_is_a_status_and_the_reservation_is_spent(parties, trainer, records):
    request = parties.request(recipe_hash=recipe_hash(RECIPE))
    assert trainer.train(request) == Status(StatusCode.LOST)
    assert trainer.train(request) == Status(StatusCode.LOST)
    assert trainer.guard.spent("notes").epsilon > 0
