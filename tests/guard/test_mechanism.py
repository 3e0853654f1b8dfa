"""What the guard lets a plan say about clipping and noise, and what it keeps of it."""

from dataclasses import replace

import pytest

from client.admission import Granted, Refused
from common.mechanism import Mechanism
from common.messages import Envelope, RefusalReason
from common.privacy import SampledGaussian

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=4)
SHAPES = {"a.lora_B": (4, 2), "b.lora_B": (3, 2)}
SCALES = (("a.lora_B", 1.5), ("b.lora_B", 0.5))
SOUND = {
    "plain": Mechanism(),
    "automatic": Mechanism("automatic"),
    "adaptive": Mechanism("adaptive", count_noise=2.0),
    "least energy": Mechanism(noise_allocation="min-energy"),
    "importance before any": Mechanism(noise_allocation="importance"),
    "importance in the scaled norm": Mechanism(noise_allocation="importance", scales=SCALES),
}
UNSOUND = {
    "the same weights under plain clipping": Mechanism(noise_allocation="uniform", scales=SCALES),
    "the same weights under another name": Mechanism(noise_allocation="weighted", scales=SCALES),
    "a count that costs more than the step": Mechanism("adaptive", count_noise=0.5),
    "a count without noise": Mechanism("adaptive", count_noise=0.0),
    "scales beyond the condition number": replace(
        SOUND["importance in the scaled norm"], scales=(("a.lora_B", 2000.0), ("b.lora_B", 1.0))
    ),
    "scales so small that float32 loses the gradient": replace(
        SOUND["importance in the scaled norm"], scales=(("a.lora_B", 1e-25), ("b.lora_B", 1e-25))
    ),
    "a range down to where float32 loses the gradient": Mechanism("adaptive", count_noise=2.0, lower=1e-30),
    "scales for another tensor": replace(SOUND["importance in the scaled norm"], scales=(("a.lora_B", 1.0),)),
    "an unknown clipping": Mechanism("none"),
    "a text for a mechanism": "fixed",
    "a text for a scale": Mechanism(noise_allocation="importance", scales=(("a.lora_B", "1"), ("b.lora_B", 1.0))),
}


@pytest.mark.parametrize("mechanism", SOUND.values(), ids=SOUND)
def test_sound_mechanisms_are_granted_and_named_in_the_certificate(parties, guard, mechanism):
    found = guard.admit(parties.request(mechanism=mechanism), shapes=SHAPES)
    assert isinstance(found, Granted)
    guard.start(found.request)
    key = parties.coordinator.public_key
    assert guard.part(key, "run", "notes", code_digest="c" * 64).part.mechanism == mechanism.name


@pytest.mark.parametrize("mechanism", UNSOUND.values(), ids=UNSOUND)
def test_unsound_mechanisms_are_refused_before_a_record_is_read(parties, guard, mechanism, monkeypatch):
    if isinstance(mechanism, str):  # in one process nothing but the guard would notice
        plan = parties.plan()
        object.__setattr__(plan, "mechanism", mechanism)
        monkeypatch.setattr(type(plan), "to_json", lambda self: {"mechanism": str(self.mechanism)})
        request = parties.request(plan)
    else:
        request = parties.request(mechanism=mechanism)
    found = guard.admit(request, shapes=SHAPES)
    assert isinstance(found, Refused)
    assert found.refusal.reason is RefusalReason.PLAN
    assert guard.spent("notes").epsilon == 0.0


def test_a_run_without_privacy_has_no_mechanism(parties):
    datasets = {"notes": parties.policy().datasets["notes"].model_copy(update={"without_privacy": True})}
    guard = parties.guard(datasets=datasets)
    request = parties.request(event=None, envelope=Envelope(()), clipping_norm=0.0, mechanism=Mechanism("automatic"))
    assert guard.admit(request, shapes=SHAPES).refusal.reason is RefusalReason.PLAN


def test_the_threshold_goes_on_where_the_last_answered_round_left_it(parties, guard):
    adaptive = Mechanism("adaptive", count_noise=2.0)

    def request(place, run_id="run"):
        return parties.request(server_round=place + 1, participation=place, mechanism=adaptive, run_id=run_id)

    def update():
        import numpy as np

        return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    first, second, third = (request(place) for place in range(3))
    assert guard.clipping_norm(first) == first.plan.clipping_norm == 1.0
    guard.admit(first, shapes=SHAPES)
    guard.start(first)
    guard.finish(first, update(), clipping_norm=0.75)
    assert guard.clipping_norm(second) == 0.75
    guard.admit(second, shapes=SHAPES)
    guard.start(second)
    again = parties.restart()  # the second round is lost, and what it would have released too
    assert again.clipping_norm(third) == 0.75
    fixed = parties.request(server_round=3, participation=2, mechanism=Mechanism(), run_id="run")
    assert again.clipping_norm(fixed) == fixed.plan.clipping_norm, "what does not adapt is clipped as its plan says"
    assert again.clipping_norm(request(0, run_id="another run")) == 1.0
