"""``--reparametrization rgp`` in a whole run: paid as planned, named, saved for stock peft, the same after a kill."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel

from client.backbone import load_model
from client.data import ColumnNames
from client.evaluator import Evaluator
from client.trainer import Workbench
from common.certificate import verify_certificate
from common.config import RunConfig
from common.errors import InvalidInput
from deploy.reporting.use import evaluate_adapter
from deploy.simulation.simulate import Watcher, quiet_warnings, simulate

RGP = {
    "reparametrization": "rgp", "aggregation": "fedavg", "target_epsilon": 4.0, "server_optimizer": "fedavg",
    "server_learning_rate": 0.5, "seed": 3,
}  # fmt: skip


class Killed(Exception):
    pass


class Killer(Watcher):
    def __init__(self, after=None):
        self.after = after

    def round_ended(self, record):
        if record["round"] == self.after:
            raise Killed


def run(values, watcher=None):
    with quiet_warnings():
        return simulate(RunConfig.from_mapping(values), watcher)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def noted(monkeypatch):
    """noted: the carriers of every training, by round, as the trainers of this test make them."""
    found, load = {}, Workbench.load

    def note(self, adapter, server_round):
        load(self, adapter, server_round)
        pairs = [(weight.left.clone(), weight.right.clone()) for weight in self.carriers._weights]
        found.setdefault(server_round, []).append(pairs)

    monkeypatch.setattr(Workbench, "load", note)
    return found


def alike(one, other) -> bool:
    return all(
        torch.equal(a, b) for pair, same in zip(one, other, strict=True) for a, b in zip(pair, same, strict=True)
    )


def test_a_run_pays_its_plan_and_leaves_an_adapter_that_stock_peft_loads(
    tmp_path, options, noted, tiny_llama, monkeypatch
):
    evaluators, make = [], Evaluator.__init__

    def keep(self, *args, **named):
        make(self, *args, **named)
        evaluators.append(self)

    monkeypatch.setattr(Evaluator, "__init__", keep)
    result = run(options(tmp_path / "run", rounds=4, **RGP))
    verdict = verify_certificate(tmp_path / "run" / "certificate.json")
    assert verdict.certificate.methods["reparametrization"] == "rgp:2"
    assert all(0.9 * 4.0 < epsilon <= 4.0 for epsilon in result.metrics[-1]["epsilon"].values())
    assert set(noted) == {1, 2, 3, 4}
    for held in noted.values():
        assert len(held) == 3, "every trainer trains in every round"
        assert all(alike(held[0], other) for other in held[1:]), "and holds the same carriers"
    assert not alike(noted[1][0], noted[2][0])
    with quiet_warnings():
        adapted = PeftModel.from_pretrained(
            load_model(tiny_llama, task="causal-lm"), str(tmp_path / "run" / "adapter")
        ).eval()
    own = Evaluator(adapted, evaluators[0]._examples, pad_token_id=0).current()
    assert own.loss == pytest.approx(result.metrics[-1]["loss"], rel=1e-5)
    assert own.loss != pytest.approx(result.metrics[0]["loss"], rel=1e-4), "the adapter is not the untrained one"


def test_a_classifiers_head_travels_beside_the_weights_and_is_saved(tmp_path, options, material, tiny_bert):
    settings = options(tmp_path / "run", rounds=2, task="classification", model=tiny_bert, target_modules=None, **RGP)
    result = run({name: str(value) if name == "model" else value for name, value in settings.items()})
    with quiet_warnings():
        found = evaluate_adapter(tmp_path / "run" / "adapter", str(material.public), str(tiny_bert), ColumnNames())
    assert found.loss == pytest.approx(result.metrics[-1]["loss"], rel=1e-5)
    assert found.loss != pytest.approx(result.metrics[0]["loss"], rel=1e-4)


def test_a_run_that_was_killed_goes_on_with_the_same_carriers(tmp_path, options, noted):
    run(options(tmp_path / "straight", rounds=4, **RGP))
    straight = {server_round: held[0] for server_round, held in noted.items()}
    noted.clear()
    with pytest.raises(Killed):
        run(options(tmp_path / "killed", rounds=4, **RGP), Killer(after=2))
    run({"output": str(tmp_path / "killed"), "resume": True})
    assert set(noted) == {1, 2, 3, 4}
    assert all(alike(held[0], straight[server_round]) for server_round, held in noted.items())
    found = [[(line["score"], line["loss"]) for line in lines(tmp_path / name)] for name in ("straight", "killed")]
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"aggregation": "ffa"}, "--aggregation fedavg"),
        ({"aggregation": "rolora"}, "--aggregation fedavg"),
        ({"noise_allocation": "importance"}, "leave out --noise-allocation and --shrinkage"),
        ({"shrinkage": "spectral"}, "leave out --noise-allocation and --shrinkage"),
        ({"subspace": "random"}, "both choose where gradients are noised"),
        ({"precision": "bf16"}, "--precision float32"),
        ({"lora_alpha": 16}, "--lora-alpha"),
        ({"rank": 17}, "at most 16 carriers"),
    ],
)
def test_what_does_not_go_with_carriers_is_refused_before_data_is_opened(tmp_path, options, settings, why):
    with pytest.raises(InvalidInput, match=why):
        run(options(tmp_path / "run", **(RGP | {"data": str(tmp_path / "nothing.jsonl")} | settings)))
