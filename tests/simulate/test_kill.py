"""``kill -9`` at random moments: ``--resume`` ends the run, and no book ever says less than what was started."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from client.journal import Journal, State
from common.config import RunConfig
from common.ledger import Ledger
from common.privacy import PLDAccountant
from common.signing import SigningKey
from deploy.simulation.simulate import quiet_warnings, simulate
from server.accountant import EmbeddedAccountant
from server.terms import RunTerms

KILLS = int(os.environ.get("CLOISTER_SIMULATE_KILLS", "3"))
ROUNDS = 12
BEGUN = (State.STARTED, State.REPLIED, State.LOST)


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has loaded the libraries and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deploy.simulation.simulate", "transformers", "peft"])
    return context


def kill(processes, config: RunConfig, after: float, until) -> bool:
    """Run, wait until ``until()`` holds, then ``after`` seconds more, then kill; whether it was still running."""
    import deploy.simulation.simulate  # the target must be importable in the child: it is this project's own function

    process = processes.Process(target=deploy.simulation.simulate.simulate, args=(config,))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and not until() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.join(after)
    running = process.is_alive()
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return running


def epsilon_of(events, delta: float) -> float:
    return PLDAccountant().compose_all(events).epsilon(delta) if events else 0.0


def begun(output: Path, index: int) -> dict[str, object]:
    """Reservation id to event of everything that the client's own ledger says was started."""
    with Ledger(output / "state" / "clients" / f"{index + 1:04d}" / "ledger.sqlite") as ledger:
        journal = Journal(ledger)
        journal.catch_up()
        return {use.reservation_id: use.event for use in journal.uses.values() if use.state in BEGUN}


def check_books(output: Path, terms: RunTerms, finished_rounds: int) -> None:
    """Started ⊆ counted ⊆ finished rounds and the open one, for every client."""
    with Ledger(output / "ledger.sqlite") as ledger:
        accountant = EmbeddedAccountant(ledger, SigningKey.load(output / "state" / "keys" / "accountant.key"))
        for index, client in enumerate(terms.clients):
            started = begun(output, index)
            counted = {held.reservation.reservation_id for held in accountant.counting(terms.run_id, client.name)}
            assert set(started) <= counted
            assert finished_rounds <= len(counted) <= finished_rounds + 1
            spent = accountant.spent(terms.run_id, client.name).epsilon
            assert spent >= epsilon_of(list(started.values()), client.target_delta) * (1 - 1e-12)
            assert spent <= epsilon_of(client.envelope.events[: finished_rounds + 1], client.target_delta) * (1 + 1e-9)


def check_files(output: Path) -> int:
    """Every file there is is whole; how many rounds the metrics know, -1 without metrics."""
    for file in [*output.glob("*.json"), *output.glob("adapter/*.json"), output / "state" / "run.json"]:
        assert json.loads(file.read_text("utf-8"))
    if (output / "adapter").exists():
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(os.listdir(output / "adapter"))
    if not (output / "metrics.jsonl").exists():
        return -1
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["round"] for line in lines] == list(range(len(lines)))
    return len(lines) - 1


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_ends_with_the_right_epsilon(tmp_path, options, processes):
    draw = random.Random()
    output = tmp_path / "run"
    config = RunConfig.from_mapping(options(output, rounds=ROUNDS, local_steps=2))
    resumed = RunConfig.from_mapping({"output": str(output), "resume": True})
    metrics = output / "metrics.jsonl"
    seen, done, moments = -1, 0, []
    for number in range(KILLS):
        goal = seen + draw.randrange(4)

        def reached(goal=goal):
            return metrics.exists() and metrics.read_text("utf-8").count("\n") > goal

        wait = draw.uniform(0.0, 0.6)
        moments.append((goal, round(wait, 3)))
        begin = not (output / "state" / "run.json").exists()
        running = kill(processes, config if begin else resumed, wait, reached)
        if not (output / "state" / "run.json").exists():
            continue
        rounds = check_files(output)
        assert rounds >= seen, f"a finished round was forgotten; kills at {moments}"
        seen, done = rounds, number + 1
        if not running:
            break
    with quiet_warnings():
        result = simulate(resumed)
    assert done >= 1
    assert check_files(output) == ROUNDS
    check_books(output, result.terms, ROUNDS)
    last = result.metrics[-1]["epsilon"]
    for client in result.terms.clients:
        certified = epsilon_of(client.envelope.events, client.target_delta)
        assert last[client.name] == pytest.approx(certified, rel=1e-9), f"kills at {moments}"
        assert last[client.name] <= client.target_epsilon
    for earlier, later in zip(result.metrics, result.metrics[1:], strict=False):
        assert all(earlier["epsilon"][name] <= later["epsilon"][name] for name in last)
    assert not [file for file in output.rglob("*") if file.name.endswith((".tmp", ".new"))]


@pytest.mark.parametrize("moment", ["before run.json", "after run.json"])
def test_a_run_killed_before_its_first_line_can_be_started_again(tmp_path, options, monkeypatch, moment):
    import deploy.simulation.simulate as under_test

    output = tmp_path / "run"
    config = RunConfig.from_mapping(options(output, rounds=1))

    class Killed(BaseException):
        pass

    real = under_test._write_settings

    def deadly(*arguments):
        if moment == "after run.json":
            real(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(under_test, "_write_settings", deadly)
        patch.setattr(under_test, "_remove_if_unstarted", lambda *_: None)  # a killed process tidies nothing
        with quiet_warnings(), pytest.raises(Killed):
            simulate(config)
    assert (output / "state").exists()
    again = config if moment == "before run.json" else RunConfig.from_mapping({"output": str(output), "resume": True})
    with quiet_warnings():
        result = simulate(again)
    assert result.metrics[-1]["round"] == 1
