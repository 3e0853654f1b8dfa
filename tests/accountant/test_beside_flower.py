"""Flower's accountant and ours side by side: both are restarted in the middle of a run."""

from flwr.supercore import privacy_accounting as flower
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from common.privacy import SampledGaussian
from server.accountant import Ask, Outcome

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)


def flowers():
    """Flower's accountant as an application makes it when it starts."""
    return RdpAccountant(
        flower.PrivacyConfig(
            target_delta=1e-5,
            population_size=1000,
            neighboring_relation=flower.NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=flower.SamplingMethod.POISSON,
        )
    )


def test_after_a_restart_flowers_accountant_says_zero_and_ours_the_truth(accountant, reopen, registration):
    theirs = flowers()
    theirs.compose(flower.GaussianPrivacyEvent(1.0, sample_size=10, population_size=1000), count=EVENT.steps)
    accountant.register("run", {"a": registration()})
    (signed,) = accountant.reserve("run", 1, [Ask("a", EVENT)]).granted
    accountant.commit("run", {signed.reservation.reservation_id: Outcome.REPLIED})
    truth = accountant.spent("run", "a")
    assert theirs.get_epsilon(1e-5) >= truth.epsilon > 0.5

    theirs, ours = flowers(), reopen()
    assert theirs.get_epsilon(1e-5) == 0
    assert ours.spent("run", "a") == truth
