"""A federation whose trainers are reached over real gRPC sockets, through the apps that a deployment loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from client.guard import Guard
from client.policy import DatasetPolicy, Policy
from client.relay import app as relay_app
from client.relay import connect_by_address
from client.trainer_service import serve as serve_trainer
from common.attestation import PartRequest
from common.certificate import SignedPart, verify_certificate
from common.config import RunConfig
from common.errors import InvalidInput, Unavailable
from common.history import ListRequest, SignedHistory
from common.messages import Description, Reply, Status, StatusCode, TrainRequest, adapter_hash
from common.privacy import PLDAccountant
from common.recipe import recipe_of
from common.signing import SigningKey
from deploy.simulation.inprocess_grid import InProcessGrid
from server.app import HOME_VARIABLE
from server.app import app as server_app

INITIAL = {"layer.lora_B": np.zeros((3, 2), dtype=np.float32)}
BACKBONE = "b" * 64
RECIPE = recipe_of(RunConfig(), max_length=64, target_modules=["layer"], classes=())
RUN = "0123456789abcdef"


class CountingTrainer:
    """A trainer without a model: the real guard and a fixed update, so that the wire and the rules are tested."""

    def __init__(self, name: str, guard: Guard) -> None:
        self.name, self.guard, self.trained = name, guard, 0

    def describe(self) -> Description:
        return Description(
            self.name, self.name, self.guard.public_key, 1000, BACKBONE,
            {n: a.shape for n, a in INITIAL.items()}, tuple(INITIAL), adapter_hash(INITIAL), RECIPE,
        )  # fmt: skip

    def signed_list(self, request: ListRequest) -> SignedHistory:
        return self.guard.signed_list(request)

    def signed_part(self, request: PartRequest) -> SignedPart:
        return self.guard.signed_part(request, code_digest="c" * 64)

    def train(self, request: TrainRequest) -> Reply | Status:
        admission = self.guard.admit(request, shapes={n: a.shape for n, a in INITIAL.items()})
        if not hasattr(admission, "request"):
            return getattr(admission, "reply", None) or getattr(admission, "refusal", None) or Status(StatusCode.LOST)
        self.guard.start(request)
        self.trained += 1
        return self.guard.finish(request, {"layer.lora_B": np.ones((3, 2), dtype=np.float32)})


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    folder = tmp_path / "runs" / RUN
    folder.mkdir(parents=True)
    (folder / "clients").write_text("2\n")
    (folder / "run.toml").write_text('rounds = 2\nserver-optimizer = "fedavg"\nserver-learning-rate = 1.0\n')
    np.savez(folder / "initial.npz", **INITIAL)
    return folder


@pytest.fixture
def trainers(tmp_path: Path, run_folder: Path):
    coordinator = SigningKey.load_or_create(tmp_path / "keys" / "coordinator.key")
    accountant = SigningKey.load_or_create(tmp_path / "keys" / "accountant.key")
    made, servers = {}, []
    for name in ("east", "west"):
        policy = Policy(
            organisation=name,
            datasets={name: DatasetPolicy(declared_records=1000, target_epsilon=8.0)},
            min_noise_multiplier=0.1,
            max_sample_rate=0.5,
            max_steps_per_round=1,
            backbones=(BACKBONE,),
            coordinator_keys=(coordinator.public_key,),
            accountant_keys=(accountant.public_key,),
        )
        guard = Guard(policy, tmp_path / f"{name}.sqlite", key=SigningKey.generate())
        made[name] = CountingTrainer(name, guard)
        servers.append(serve_trainer(made[name], f"unix:{tmp_path}/{name}.sock"))
    yield made
    for server in servers:
        server.stop(0).wait()
    for trainer in made.values():
        trainer.guard.close()


def grid_of(tmp_path: Path, names: list[str]) -> InProcessGrid:
    grid = InProcessGrid(relay_app, names)
    for context, name in zip(grid._contexts.values(), names, strict=True):
        context.node_config["trainer"] = f"unix:{tmp_path}/{name}.sock"
    return grid


def run(grid: InProcessGrid, folder: Path) -> list[dict]:
    config = {"run": folder.name}
    server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_trainers_behind_sockets_train_one_adapter(tmp_path, run_folder, trainers):
    lines = run(grid_of(tmp_path, ["east", "west"]), run_folder)
    assert [line["round"] for line in lines] == [0, 1, 2]
    with np.load(run_folder / "adapter.npz") as file:
        np.testing.assert_array_equal(file["layer.lora_B"], np.full((3, 2), 2.0, dtype=np.float32))
    for name, trainer in trainers.items():
        uses = trainer.guard.uses(SigningKey.load(tmp_path / "keys" / "coordinator.key").public_key, RUN)
        truth = PLDAccountant().compose_all([use.event for use in uses]).epsilon(delta=1e-5)
        assert lines[-1]["epsilon"][name] == pytest.approx(truth, rel=1e-9)
        assert trainer.trained == 2
    verdict = verify_certificate(run_folder / "certificate.json")
    assert verdict.private
    assert {name: found.epsilon for name, found in verdict.epsilons.items()} == pytest.approx(lines[-1]["epsilon"])
    assert not verdict.certificate.simulation
    assert json.loads((run_folder / "state.json").read_text())["state"] == "finished"


def test_trainers_set_otherwise_than_the_run_are_refused_by_the_settings_name_and_nothing_is_sent(
    tmp_path, run_folder, trainers
):
    settings = (run_folder / "run.toml").read_text()
    (run_folder / "run.toml").write_text(settings + "lora-alpha = 32.0\n")
    with pytest.raises(InvalidInput, match=r"east: lora-alpha is 16\.0 in its trainer\.toml and 32\.0 in this run"):
        run(grid_of(tmp_path, ["east", "west"]), run_folder)
    assert json.loads((run_folder / "state.json").read_text())["exit_code"] == 2
    assert not (run_folder / "parties.json").exists()
    for trainer in trainers.values():
        coordinator = SigningKey.load(tmp_path / "keys" / "coordinator.key").public_key
        assert trainer.trained == 0
        assert trainer.guard.uses(coordinator, RUN) == ()


def test_a_trainer_of_another_version_is_refused_before_the_run_is_registered(tmp_path, run_folder, trainers):
    described = trainers["west"].describe()
    trainers["west"].describe = lambda: replace(described, version="0.0.9")
    with pytest.raises(Unavailable, match=r"'west' runs version '0\.0\.9' of Cloister.*pip install 'cloister=="):
        run(grid_of(tmp_path, ["east", "west"]), run_folder)
    assert json.loads((run_folder / "state.json").read_text())["exit_code"] == 7
    assert not (run_folder / "parties.json").exists()
    assert not (tmp_path / "ledger.sqlite").exists()
    coordinator = SigningKey.load(tmp_path / "keys" / "coordinator.key").public_key
    for trainer in trainers.values():
        assert (trainer.trained, trainer.guard.uses(coordinator, RUN)) == (0, ())


def test_the_same_folder_run_again_trains_nothing_more(tmp_path, run_folder, trainers):
    first = run(grid_of(tmp_path, ["east", "west"]), run_folder)
    again = run(grid_of(tmp_path, ["east", "west"]), run_folder)
    assert again == first
    assert {trainer.trained for trainer in trainers.values()} == {2}


def test_a_trainer_that_is_gone_costs_the_round_and_says_one_word(tmp_path, run_folder, trainers):
    grid = grid_of(tmp_path, ["east", "west"])
    answers = []
    trainers["west"].train = lambda request: answers.append(1) or (_ for _ in ()).throw(Unavailable("gone: record 17"))
    lines = run(grid, run_folder)
    assert answers
    assert lines[-1]["epsilon"]["west"] == pytest.approx(lines[-1]["epsilon"]["east"])
    with np.load(run_folder / "adapter.npz") as file:
        np.testing.assert_array_equal(file["layer.lora_B"], np.full((3, 2), 2.0, dtype=np.float32))


def test_a_node_without_a_trainer_address_says_how_to_name_one():
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(InvalidInput, match="trainer="):
        connect_by_address(context)


@pytest.mark.parametrize(
    ("name", "home", "says"),
    [("", ".", "submit"), (RUN, None, HOME_VARIABLE), ("../../etc", ".", "is no run"), (RUN, ".", "no such run")],
)
def test_a_run_that_cannot_be_found_says_why(tmp_path, monkeypatch, name, home, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    if home is not None:
        monkeypatch.setenv(HOME_VARIABLE, home)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={"run": name})
    with pytest.raises(InvalidInput, match=says):
        server_app(InProcessGrid(relay_app, []), context)
