"""An organisation that names the methods it has reviewed gets those, and no others."""

from datetime import UTC, datetime

import pytest

from client.admission import Granted, Refused
from client.policy import AllowedMethods, Policy
from common.errors import InvalidInput
from common.mechanism import Mechanism
from common.messages import RefusalReason
from common.recipe import recipe_hash

SHAPES = {"a.lora_B": (4, 2), "b.lora_B": (3, 2)}
PLAIN = AllowedMethods(clipping=("fixed",), noise_allocation=("uniform",), aggregation=("ffa",), optimizer=("adam",))
OTHERS = {
    "clipping": {"mechanism": Mechanism("automatic")},
    "noise_allocation": {"mechanism": Mechanism(noise_allocation="min-energy")},
    "aggregation": {"aggregation": "rolora"},
    "optimizer": {"optimizer": "sgd"},
}


def test_the_allowed_methods_are_admitted(parties):
    admission = parties.guard(allowed_methods=PLAIN).admit(parties.request(), shapes=SHAPES)
    assert isinstance(admission, Granted)


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_with_another_method_is_refused_and_costs_nothing(parties, name):
    guard = parties.guard(allowed_methods=PLAIN)
    admission = guard.admit(parties.request(**OTHERS[name]), shapes=SHAPES)
    assert isinstance(admission, Refused)
    assert (admission.refusal.reason, admission.refusal.voiding) == (RefusalReason.POLICY, True)
    assert guard.spent("notes").epsilon == 0.0


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_policy_does_not_name_stays_free(parties, name):
    allowed = PLAIN.model_copy(update={name: None})
    assert isinstance(
        parties.guard(allowed_methods=allowed).admit(parties.request(**OTHERS[name]), shapes=SHAPES), Granted
    )


@pytest.mark.parametrize("kind", ["lora", "rgp"])
def test_a_trainer_set_to_what_the_policy_does_not_name_trains_nothing(parties, kind):
    """What is trained stands in the trainer's own settings, which every plan names; the policy is above both."""
    recipe = {"reparametrization": kind}
    request = parties.request(recipe_hash=recipe_hash(recipe))
    guard = parties.guard(allowed_methods=AllowedMethods(reparametrization=("lora",)))
    admission = guard.admit(request, shapes=SHAPES, recipe=recipe)
    if kind == "lora":
        assert isinstance(admission, Granted)
    else:
        assert (admission.refusal.reason, admission.refusal.voiding) == (RefusalReason.POLICY, True)
        assert guard.spent("notes").epsilon == 0.0


def test_modules_have_no_noise_of_their_own_behind_gradient_carriers(parties):
    recipe = {"reparametrization": "rgp"}
    request = parties.request(recipe_hash=recipe_hash(recipe), mechanism=Mechanism(noise_allocation="min-energy"))
    admission = parties.guard().admit(request, shapes=SHAPES, recipe=recipe)
    assert admission.refusal.reason is RefusalReason.RECIPE


POLICY = """
organisation = "clinic-a"
min-noise-multiplier = 0.5
max-sample-rate = 0.2
max-steps-per-round = 8
backbones = []
coordinator-keys = ["AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]
accountant-keys = ["AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]

[datasets.notes]
declared-records = 12000
target-epsilon = 8.0
"""


def load(tmp_path, text):
    file = tmp_path / "policy.toml"
    file.write_text(POLICY + text, "utf-8")
    return Policy.load(file)


def test_the_policy_file_names_them_with_dashes(tmp_path):
    policy = load(tmp_path, '\n[allowed-methods]\nclipping = ["fixed", "automatic"]\nnoise-allocation = ["uniform"]\n')
    assert policy.allowed_methods == AllowedMethods(clipping=("fixed", "automatic"), noise_allocation=("uniform",))
    assert load(tmp_path, "").allowed_methods == AllowedMethods()


@pytest.mark.parametrize(
    ("line", "message"),
    [('clipping = ["none"]', "allowed-methods.clipping"), ('cliping = ["fixed"]', "did you mean clipping")],
)
def test_a_method_that_nobody_knows_is_refused(tmp_path, line, message):
    with pytest.raises(InvalidInput, match=message):
        load(tmp_path, f"\n[allowed-methods]\n{line}\n")


BROKEN = {
    "noise_multiplier=0.4": "min-noise-multiplier = 0.5, asked for 0.4",
    "sample_rate=0.06": "max-sample-rate = 0.05, asked for 0.06",
    "local_steps": "max-steps-per-round = 8, asked for 9",
    "event=None": "without-privacy = false, asked for training without noise",
    "clinic-b": "organisation = clinic-a, asked for clinic-b",
    "other": "it names no data set other",
    "999": "declared-records = 1000, asked for 999",
}
"""By a piece of what the plan says: what the organisation's own log says to it."""


def test_the_organisations_own_log_names_the_limit_and_the_refusal_does_not(parties, guard, lie, caplog):
    changes, reason = lie
    said = ", ".join(f"{name}={value}" for name, value in changes.items())
    with caplog.at_level("WARNING", logger="client.checks"):
        request = parties.request(**changes)
        admission = guard.admit(request, shapes=SHAPES)
    if reason is RefusalReason.POLICY:
        (record,) = caplog.records
        (broken,) = {words for piece, words in BROKEN.items() if piece in said}
        assert record.getMessage() == f"the policy forbids this plan: {broken}"
        assert record.run == request.plan.run_id
        assert broken not in str(admission.refusal.to_json())
    else:
        assert not caplog.records


def test_a_policy_that_has_ended_and_a_method_that_it_lacks_are_named_too(parties, caplog):
    with caplog.at_level("WARNING", logger="client.checks"):
        parties.guard(expires=datetime.fromtimestamp(1, UTC)).admit(parties.request(), shapes=SHAPES)
        parties.restart(allowed_methods=AllowedMethods(optimizer=("sgd",))).admit(parties.request(), shapes=SHAPES)
    ended, method = (record.getMessage() for record in caplog.records)
    assert ended.endswith("has passed")
    assert method.endswith("allowed-methods has no optimizer adam")
