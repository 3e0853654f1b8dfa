"""A run whose noise moves over the rounds is charged as its whole list, and each round must keep its own place."""

import pytest

from client.admission import Granted, Refused
from common.charge import charge
from common.messages import Envelope, RefusalReason
from common.privacy import SampledGaussian

SIGMAS = (2.0, 1.6, 1.2, 0.8)
LIST = tuple(SampledGaussian(sigma, 0.01, 4) for sigma in SIGMAS)
SHAPES = {"a.lora_B": (4, 2), "b.lora_B": (3, 2)}


def request(parties, place, event=None, events=LIST):
    event = event or LIST[place]
    changes = {"server_round": place + 1, "participation": place, "event": event, "envelope": Envelope(events)}
    return parties.request(**changes)


def test_the_list_is_charged_as_a_whole_not_at_its_least_noise(parties, guard):
    assert isinstance(guard.admit(request(parties, 0), shapes=SHAPES), Granted)
    delta = guard.policy.datasets["notes"].delta_per_run
    whole = charge(LIST, relation="add_remove", delta=delta).epsilon
    worst = charge((LIST[-1],) * 4, relation="add_remove", delta=delta).epsilon
    assert guard.spent("notes").epsilon == pytest.approx(whole, rel=1e-9)
    assert whole < 0.8 * worst


def test_every_round_at_its_own_place_is_trained(parties, guard):
    for place in range(4):
        parties.train(guard, request(parties, place))
    assert len(guard.uses(parties.coordinator.public_key, "run")) == 4


@pytest.mark.parametrize(("place", "other"), [(0, 1), (0, 3), (2, 3)])
def test_less_noise_than_the_place_of_the_list_is_refused(parties, guard, place, other):
    found = guard.admit(request(parties, place, event=LIST[other]), shapes=SHAPES)
    assert isinstance(found, Refused)
    assert found.refusal.reason is RefusalReason.ENVELOPE


def test_another_list_in_the_middle_of_a_run_is_refused(parties, guard):
    parties.train(guard, request(parties, 0))
    swapped = (LIST[0], LIST[2], LIST[1], LIST[3])
    found = guard.admit(request(parties, 1, event=swapped[1], events=swapped), shapes=SHAPES)
    assert isinstance(found, Refused)
    assert found.refusal.reason is RefusalReason.ENVELOPE


def test_a_list_that_does_not_fit_the_budget_is_refused_though_its_first_round_would(parties, guard):
    dear = (SampledGaussian(2.0, 0.01, 4), *(SampledGaussian(0.5, 0.05, 8),) * 9)
    found = guard.admit(request(parties, 0, event=dear[0], events=dear), shapes=SHAPES)
    assert isinstance(found, Refused)
    assert found.refusal.reason is RefusalReason.BUDGET
