import json

import pytest
import typer
from typer.testing import CliRunner

from common.errors import InvalidInput
from common.privacy import PLDAccountant, SampledGaussian
from deploy.commands.plan import calibrate, plan, print_federation
from deploy.planning.calibration import calibration_report
from deploy.planning.plan import (
    ClientPlan,
    NoiseShape,
    RoundPlan,
    accountant_rows,
    federation_report,
    plan_report,
)

ROUNDS = RoundPlan(noise_multiplier=1.0, sample_rate=0.02, local_steps=5, rounds=20)


@pytest.fixture(scope="module")
def report():
    return plan_report(ROUNDS, target_delta=1e-5, target_epsilon=1.0)


def test_the_plan_costs_what_the_run_will_cost(report):
    run = PLDAccountant()
    for _ in range(20):
        run = run.compose(ROUNDS.event)
    assert report.epsilon == pytest.approx(run.epsilon(1e-5), rel=1e-9)
    assert [point.server_round for point in report.curve] == list(range(1, 21))
    assert report.curve[-1].epsilon == pytest.approx(report.epsilon, rel=1e-9)
    epsilons = [point.epsilon for point in report.curve]
    assert epsilons == sorted(epsilons)
    assert all(point.epsilon_rdp >= point.epsilon for point in report.curve)


def test_rounds_and_noise_for_the_target_are_just_enough(report):
    assert 0 < report.rounds_that_fit < 20

    def cost(rounds, sigma=1.0):
        return PLDAccountant().compose(SampledGaussian(sigma, 0.02, 5 * rounds)).epsilon(1e-5)

    assert cost(report.rounds_that_fit) <= 1.0 < cost(report.rounds_that_fit + 1)
    assert cost(20, report.noise_multiplier_for_target) <= 1.0


def test_every_dial_moves_epsilon_the_way_it_should(report):
    for row in report.dials:
        start = {"noise-multiplier": 1.0, "sample-rate": 0.02, "rounds": 20, "target-delta": 1e-5}[row.dial]
        worse = row.value > start if row.dial in ("sample-rate", "rounds") else row.value < start
        assert (row.change > 0) == worse
    assert {row.dial for row in report.dials} == {"noise-multiplier", "sample-rate", "rounds", "target-delta"}


def test_accountants_stand_side_by_side_and_say_what_they_are(report):
    kinds = {row.accountant: row.kind for row in report.accountants}
    assert kinds["pld"] == "certified"
    assert kinds["rdp"] == "upper bound"
    assert kinds["edgeworth, tilted"] == kinds["edgeworth"] == "estimate"
    assert report.relation == "add_remove"
    assert report.sampler == "poisson"
    json.dumps(report.to_json(), allow_nan=False)


def test_unsampled_plans_show_the_closed_form_and_hopeless_estimates_are_left_open():
    rows = {row.accountant: row for row in accountant_rows((SampledGaussian(5.0, 1.0, 9),), 1e-5, "add_remove")}
    assert rows["gdp"].epsilon == pytest.approx(rows["pld"].epsilon, rel=1e-9)
    tiny = {row.accountant: row for row in accountant_rows((SampledGaussian(0.09, 0.1),), 1e-5, "add_remove")}
    assert tiny["edgeworth"].epsilon is None
    assert "noise_multiplier" in tiny["edgeworth"].note


def test_long_plans_are_shown_at_fewer_points():
    long = plan_report(RoundPlan(2.0, 0.01, 1, 1001), target_delta=1e-5)
    assert len(long.curve) <= 201
    assert long.curve[-1].server_round == 1001
    assert long.rounds_that_fit is None


def test_a_dial_that_leaves_the_computable_range_has_no_row():
    edge = plan_report(RoundPlan(0.0501, 0.5, 1, 1), target_delta=1e-5)
    assert [row.value for row in edge.dials if row.dial == "noise-multiplier"] == [pytest.approx(0.05511)]


def test_a_federation_costs_what_its_runs_cost():
    clients = [
        ClientPlan("a", (SampledGaussian(1.0, 0.01, 5),) * 6, 1e-5, 1.0),
        ClientPlan("b", (SampledGaussian(0.8, 0.05, 5),) * 6, 1e-6, 1.0),
        ClientPlan("c", (), 1e-5),
    ]
    found = federation_report(clients)
    for client, cost in zip(clients, found.clients, strict=True):
        once = PLDAccountant().compose_all(client.events).epsilon(client.target_delta)
        assert cost.epsilon == pytest.approx(once, rel=1e-9)
        assert len(cost.epsilon_by_round) == len(client.events)
    assert [cost.fits for cost in found.clients] == [True, False, None]
    assert found.epsilon == max(cost.epsilon for cost in found.clients)
    json.dumps(found.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match="clients must not be empty"):
        federation_report([])
    from rich.console import Console

    console = Console(record=True, width=120)
    print_federation(found, console)
    assert "the largest" in console.export_text()


def test_calibration_reports_the_noise_that_pld_saves():
    found = calibration_report(target_epsilon=3.0, target_delta=1e-5, sample_rate=0.03, rounds=50, local_steps=4)
    assert found.epsilon <= 3.0
    assert 0.03 < found.noise_saved < 0.08
    assert found.steps_at_rdp_noise > 200
    assert found.sample_rate_at_rdp_noise > 0.03
    assert found.noise_multipliers == (found.noise_multiplier,) * 50
    json.dumps(found.to_json(), allow_nan=False)


app = typer.Typer()
app.command()(plan)
app.command()(calibrate)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_commands_print_tables_and_json(tmp_path):
    base = ("plan", "--noise-multiplier", 1, "--expected-batch-size", 20, "--declared-records", 1000, "--rounds", 5)
    shown = run(*base, "--target-epsilon", 1, "--plot", tmp_path / "plan.svg")
    assert shown.exit_code == 0, shown.output
    assert "certified" in shown.output
    assert "rounds fit" in shown.output
    assert (tmp_path / "plan.svg").read_text().lstrip().startswith("<?xml")
    body = json.loads(run(*base, "--json", "--plot", tmp_path / "plan.png").output)
    assert body["delta"] == 1e-5
    assert body["plan"]["sample_rate"] == 0.02
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    noise = run("calibrate", "--target-epsilon", 3, "--sample-rate", 0.1, "--rounds", 6, "--noise-schedule", "cosine")
    assert noise.exit_code == 0, noise.output
    assert "noise-schedule cosine" in noise.output
    assert json.loads(run("calibrate", "--target-epsilon", 3, "--sample-rate", 0.1, "--json").output)["rounds"] == 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "--noise-multiplier", 0, "--sample-rate", 0.1), "noise_multiplier"),
        (("plan", "--noise-multiplier", 1), "--sample-rate"),
        (("plan", "--noise-multiplier", 1, "--sample-rate", 0.1, "--expected-batch-size", 3), "not both"),
        (("plan", "--noise-multiplier", 1, "--sample-rate", 0.1, "--relation", "neighbour"), "relation must be"),
        (("plan", "--noise-multiplier", 1, "--sample-rate", 0.1, "--plot", "x.pdf"), "must end in"),
        (("plan", "--noise-multiplier", 1, "--sample-rate", 0.1, "--target-delta", 2), "delta must be"),
        (("calibrate", "--target-epsilon", -1, "--sample-rate", 0.1), "target_epsilon"),
        (("calibrate", "--target-epsilon", 1, "--sample-rate", 0.1, "--noise-schedule", "zigzag"), "kind must be"),
    ],
)
def test_a_bad_setting_is_named_with_its_range(arguments, said):
    result = run(*arguments)
    assert isinstance(result.exception, InvalidInput)
    assert said in str(result.exception)


@pytest.mark.parametrize("schedule", ["step", "exponential", "cosine", "lr-matched"])
def test_a_plan_with_a_schedule_costs_its_list(schedule):
    shape = NoiseShape(schedule, server_schedule="linear")
    scheduled = RoundPlan(1.0, 0.02, 5, 20, shape)
    report = plan_report(scheduled, target_delta=1e-5, target_epsilon=0.9)
    sigmas = [event.noise_multiplier for event in scheduled.after(20)]
    assert sigmas[0] == 1.0
    assert len(set(sigmas)) > 3
    run = PLDAccountant()
    for sigma in sigmas:
        run = run.compose(SampledGaussian(sigma, 0.02, 5))
    assert report.epsilon == pytest.approx(run.epsilon(1e-5), rel=1e-9)
    assert report.curve[-1].epsilon == pytest.approx(report.epsilon, rel=1e-9)
    assert 0 < report.rounds_that_fit < 20
    calibrated = RoundPlan(report.noise_multiplier_for_target, 0.02, 5, 20, shape)
    assert 0.89 < PLDAccountant().compose_all(calibrated.after(20)).epsilon(1e-5) <= 0.9


def test_the_commands_know_the_schedules():
    base = ("--rounds", 8, "--sample-rate", 0.1, "--noise-schedule", "step", "--noise-drop", 0.8, "--noise-every", 2)
    noise = json.loads(run("calibrate", "--target-epsilon", 2, *base, "--json").output)["noise_multipliers"]
    assert [round(sigma / noise[0], 3) for sigma in noise] == [1, 1, 0.8, 0.8, 0.64, 0.64, 0.512, 0.512]
    shown = json.loads(run("plan", "--noise-multiplier", noise[0], *base, "--json").output)
    assert 1.99 < shown["epsilon"] <= 2.0
    result = run("plan", "--noise-multiplier", 1, "--sample-rate", 0.1, "--server-schedule", "warm")
    assert "server_schedule must be" in str(result.exception)
