"""The boundary: noise of the charged size, ordinary replies whatever a record holds, one release per reservation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch.nn import functional

from client.adapter import set_arrays
from client.engine import Example
from client.trainer import Trainer
from common.messages import Refusal, RefusalReason, Reply, Status, StatusCode, adapter_hash

LOST = Status(StatusCode.LOST)


def examples(count, *, seed=0, length=10):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(3, 259, length)
        labels = ids.copy()
        labels[: length // 2] = -100
        made.append(Example(ids, labels))
    return made


def flat(update) -> np.ndarray:
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


def ordinary(answer, request) -> bool:
    """A reply like any other: every tensor, its shape, finite numbers, the reservation and a head."""
    return (
        isinstance(answer, Reply)
        and {n: a.shape for n, a in answer.update.items()} == {n: a.shape for n, a in request.adapter.items()}
        and all(np.isfinite(array).all() and array.dtype == np.float32 for array in answer.update.values())
        and answer.reservation_id == request.reservation.reservation.reservation_id
        and len(answer.ledger_head) == 64
    )


def held_by_chi_square(values: np.ndarray, std: float) -> bool:
    """Whether normal ``values`` of mean 0 may have ``std``: both tails of the sum of squares at one in ten million."""
    statistic = float(np.sum((values / std) ** 2))
    return chi2.ppf(1e-7, values.size) < statistic < chi2.isf(1e-7, values.size)


def test_an_empty_draw_is_a_step_of_noise(organisation):
    clinic = organisation()
    request = clinic.request(rate=1e-9)
    answer = clinic.open(examples(50)).train(request)
    assert ordinary(answer, request)
    assert held_by_chi_square(flat(answer.update), 1.0 / 100)


def test_an_organisation_without_records_answers_like_any_other(organisation):
    clinic = organisation()
    request = clinic.request(rate=0.5, noise=2.0)
    answer = clinic.open([]).train(request)
    assert ordinary(answer, request)
    assert held_by_chi_square(flat(answer.update), 2.0 / 100)


@pytest.mark.parametrize(
    ("noise", "clip", "batch", "steps"), [(1.0, 1.0, 100.0, 8), (0.7, 3.0, 16.0, 20), (5.0, 0.1, 1.0, 12)]
)
def test_zero_gradients_release_noise_of_exactly_the_charged_size(organisation, noise, clip, batch, steps):
    """σ·C/B per step, no more and no less: the sum over k plain steps has √k of it."""
    clinic = organisation()
    unusable = [Example(np.array([], dtype=np.int64), np.array([], dtype=np.int64))] * 20
    trainer = clinic.open(unusable)
    requests = [clinic.request(noise=noise, clip=clip, batch=batch, steps=steps, rate=0.5) for _ in range(4)]
    values = np.concatenate([flat(trainer.train(request).update) for request in requests])
    std = noise * clip / batch * math.sqrt(steps)
    assert held_by_chi_square(values, std)
    assert not held_by_chi_square(values, std * 1.3), "the test would see a wrong size"
    assert not held_by_chi_square(values, std / 1.3)
    assert abs(values.mean()) < 6 * std / math.sqrt(values.size)


POISON = {
    "huge ids": Example(np.full(8, 10**12), np.full(8, 10**12)),
    "ids beyond the vocabulary": Example(np.full(8, 259), np.full(8, 5)),
    "negative ids": Example(np.full(8, -1), np.full(8, 5)),
    "empty": Example(np.array([], dtype=np.int64), np.array([], dtype=np.int64)),
    "no target": Example(np.full(8, 5), np.full(8, -100)),
    "too long": Example(np.full(5000, 5), np.full(5000, 5)),
    "floats": Example(np.full(8, 5.5), np.full(8, 5)),
    "labels of another length": Example(np.full(8, 5), np.full(3, 5)),
    "a label beyond the vocabulary": Example(np.full(8, 5), np.full(8, 10**6)),
    "two dimensions": Example(np.full((2, 4), 5), np.full((2, 4), 5)),
    "text": Example("a patient's name", "another"),
    "nothing": Example(None, None),
}


@pytest.mark.parametrize("record", list(POISON.values()), ids=list(POISON))
def test_a_poisoned_record_gives_an_ordinary_reply_and_contributes_nothing(organisation, record):
    clinic = organisation(declared=100)
    good = examples(6)
    request = clinic.request(rate=1.0, batch=100.0)
    with_poison = clinic.open([*good[:3], record, *good[3:]], seed=1).train(request)
    again = clinic.request(rate=1.0, batch=100.0)
    # The sampler of a test draws the same noise for the same plan; one record more changes no draw of noise.
    without = clinic.open(good, seed=1).train(again)
    assert ordinary(with_poison, request)
    np.testing.assert_allclose(flat(with_poison.update), flat(without.update), rtol=0, atol=1e-6)


def test_a_record_that_makes_the_model_overflow_contributes_nothing(organisation, workshop):
    """A weight that is not finite poisons every record that meets it; the reply is ordinary noise."""
    clinic = organisation(declared=100)
    poisoned = [Example(np.full(8, 77), np.full(8, 77))] * 5
    weights = workshop.model.get_input_embeddings().weight
    kept = weights[77].clone()
    request = clinic.request(rate=1.0, batch=100.0, steps=4)
    try:
        with torch.no_grad():
            weights[77] = torch.nan
        answer = clinic.open(poisoned).train(request)
    finally:
        with torch.no_grad():
            weights[77] = kept
    assert ordinary(answer, request)
    assert held_by_chi_square(flat(answer.update), 2.0 / 100)


def test_records_are_never_trained_on_another_data_sets_budget(organisation, monkeypatch):
    """A policy may name several data sets; each of their budgets pays for its own records only."""
    clinic = organisation()
    trainer = clinic.open(examples(3))
    other = {**trainer.guard.policy.datasets, "labs": trainer.guard.policy.datasets["notes"]}
    trainer.guard.policy = trainer.guard.policy.model_copy(update={"datasets": other})
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("records were read"))
    request = clinic.request(dataset="labs")
    answer = trainer.train(request)
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.voiding) == (RefusalReason.POLICY, True)
    assert trainer.guard.spent("labs").epsilon == 0.0


def test_an_adapter_that_is_not_finite_is_refused_before_data_is_touched(organisation, monkeypatch):
    clinic = organisation()
    bad = {n: np.full_like(a, np.nan) for n, a in clinic.workshop.workbench.initial.items()}
    trainer = clinic.open(examples(3))
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("records were read"))
    answer = trainer.train(clinic.request(adapter=bad))
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.voiding) == (RefusalReason.ADAPTER, True)


def test_the_same_request_gives_the_same_bytes_and_noise_is_drawn_once(organisation, monkeypatch):
    clinic = organisation()
    request = clinic.request()
    trainer = clinic.open(examples(50))
    first = trainer.train(request)
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("trained twice"))
    second = trainer.train(request)
    assert adapter_hash(first.update) == adapter_hash(second.update)
    assert (first.reservation_id, first.ledger_head) == (second.reservation_id, second.ledger_head)
    restarted = clinic.open(examples(50)).train(request)
    assert adapter_hash(first.update) == adapter_hash(restarted.update)
    assert first.ledger_head == restarted.ledger_head


def test_two_requests_draw_different_noise(organisation):
    clinic = organisation()
    trainer = clinic.open([])
    first, second = (flat(trainer.train(clinic.request()).update) for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(first.size)


def test_a_crash_between_start_and_finish_is_lost_for_ever(organisation, monkeypatch):
    clinic = organisation()
    request = clinic.request()
    trainer = clinic.open(examples(5))

    def crash(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", crash)
        with pytest.raises(SystemExit):
            trainer.train(request)
    again = clinic.open(examples(5))
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("trained after a crash"))
    assert again.train(request) == LOST
    assert again.train(request) == LOST


def test_a_failure_after_the_start_is_lost_and_says_nothing_of_its_cause(organisation, monkeypatch, caplog):
    clinic = organisation()
    request = clinic.request()
    trainer = clinic.open(examples(5))

    def fail(*_):
        raise RuntimeError("patient 17")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", fail)
        assert trainer.train(request) == LOST
    assert trainer.train(request) == LOST
    assert "patient 17" in caplog.text, "the organisation's own log has the cause"
    assert ordinary(trainer.train(next_one := clinic.request()), next_one)


def test_no_exception_leaves_the_trainer(organisation, monkeypatch):
    clinic = organisation()
    trainer = clinic.open(examples(5))

    def full(*_):
        raise OSError(28, "no space for the notes of patient 17")

    monkeypatch.setattr(clinic.guard, "finish", full)
    assert trainer.train(clinic.request()) == Status(StatusCode.UNAVAILABLE)


def test_one_record_moves_the_reply_by_at_most_c_over_b(organisation):
    """Add/remove: same noise, one record more, full participation: the difference is that record's clipped gradient."""
    clinic = organisation(declared=100)
    every = examples(8)
    for clip in (1e-3, 0.05, 10.0):
        options = {"rate": 1.0, "batch": 10.0, "clip": clip}
        one = flat(clinic.open(every, seed=3).train(clinic.request(**options)).update)
        less = flat(clinic.open(every[:-1], seed=3).train(clinic.request(**options)).update)
        moved = float(np.linalg.norm(one - less))
        grid = clip / 10.0 * 1e-4 * math.sqrt(one.size)
        assert 0 < moved <= clip / 10.0 + grid


def test_steps_are_heard_inside_the_organisation(organisation):
    clinic, heard = organisation(), []
    clinic.open(examples(5), listener=lambda *step: heard.append(step)).train(clinic.request(steps=3))
    assert heard == [("clinic", 1, 3), ("clinic", 2, 3), ("clinic", 3, 3)]


def test_what_a_trainer_says_of_itself_does_not_depend_on_its_records(organisation):
    clinic = organisation()
    assert clinic.open(examples(5)).describe() == clinic.open(examples(90, seed=4)).describe()


def test_without_privacy_the_update_is_the_plain_mean_gradient(organisation, workshop):
    clinic = organisation(declared=6)
    every = examples(6)
    request = clinic.request(private=False, batch=6.0)
    update = clinic.open(every).train(request).update
    model = workshop.model
    set_arrays(model, request.adapter)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = 0.0
    for example in every:
        logits = model(input_ids=torch.as_tensor(example.input_ids)[None]).logits[0]
        loss = loss + functional.cross_entropy(logits[:-1], torch.as_tensor(example.labels)[1:])
    gradients = dict(zip(parameters, torch.autograd.grad(loss / 6, list(parameters.values())), strict=True))
    for name, gradient in gradients.items():
        np.testing.assert_allclose(update[name], -gradient.numpy(), rtol=1e-3, atol=1e-6)


def test_a_plan_without_privacy_needs_the_policys_word(organisation):
    clinic = organisation()
    trainer = clinic.open(examples(5))
    policy = clinic.guard.policy
    strict = policy.datasets["notes"].model_copy(update={"without_privacy": False})
    clinic.guard.policy = policy.model_copy(update={"datasets": {"notes": strict}})
    answer = trainer.train(clinic.request(private=False))
    assert isinstance(answer, Refusal)
    assert answer.reason is RefusalReason.POLICY


def test_local_adam_is_torchs(organisation):
    from client.trainer import local_optimizer

    clinic = organisation()
    plan = clinic.request(optimizer="adam", learning_rate=0.05).plan
    parameter = torch.nn.Parameter(torch.zeros(7))
    witness = torch.optim.Adam([parameter], lr=0.05)
    ours, step = torch.zeros(7), local_optimizer(plan)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        parameter.grad = torch.randn(7, generator=generator)
        ours = ours - step(parameter.grad.clone())
        witness.step()
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-5, atol=1e-6)
