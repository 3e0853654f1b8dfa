"""The policy file: what it demands, what it refuses, and the commands around it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from client.policy import Policy, default_delta
from common.errors import InvalidInput
from common.signing import SigningKey
from deploy.commands.policy import budgets, check_policy_file, policy_app, register_budget

KEY = SigningKey.generate().public_key
GOOD = f"""
organisation = "clinic-a"
min-noise-multiplier = 0.5
max-sample-rate = 0.2
max-steps-per-round = 8
backbones = ["{"b" * 64}"]
coordinator-keys = ["{KEY}"]
accountant-keys = ["{KEY}"]
expires = 2030-01-01
release = "immediate"
anchor = "/mnt/elsewhere/head"

[datasets.notes]
declared-records = 12000
target-epsilon = 8.0
"""


def load(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return Policy.load(path)


def test_a_policy_is_read_with_its_defaults(tmp_path):
    policy = load(tmp_path, GOOD)
    notes = policy.datasets["notes"]
    assert notes.target_delta == default_delta(12000) == pytest.approx(0.1 / 12000)
    assert (notes.epsilon_per_run, notes.delta_per_run) == (8.0, notes.target_delta)
    assert (notes.relation, notes.without_privacy) == ("add_remove", False)
    assert policy.has_expired(2_000_000_000)
    assert not policy.has_expired(1_800_000_000)
    assert default_delta(100) == 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('organisation = "clinic-a"\n', ""), "organisation"),
        (("max-sample-rate = 0.2", "max-sample-rat = 0.2"), "did you mean max-sample-rate"),
        (("target-epsilon = 8.0", "target-epsilon = 0"), "datasets.notes.target-epsilon"),
        (("target-epsilon = 8.0", "target-epsilon = inf"), "datasets.notes.target-epsilon"),
        (("target-epsilon = 8.0", "target-epsilon = 8.0\nepsilon = 3"), "unknown key"),
        (("target-epsilon = 8.0", "target-epsilon = 8.0\ntarget-delta = 1e-3"), "1/declared-records"),
        (("target-epsilon = 8.0", "target-epsilon = 8.0\ntarget-delta = 2e-5"), "accept-large-delta"),
        (("target-epsilon = 8.0", "target-epsilon = 8.0\nrun-epsilon = 9"), "run-epsilon"),
        (("declared-records = 12000", "declared-records = 0"), "declared-records"),
        (("max-sample-rate = 0.2", "max-sample-rate = 1.1"), "max-sample-rate"),
        (('release = "immediate"', 'release = "slot"'), "release"),
        ((f'accountant-keys = ["{KEY}"]', 'accountant-keys = ["AAAA"]'), "Ed25519"),
        ((f'accountant-keys = ["{KEY}"]', "accountant-keys = []"), "accountant-keys"),
        (("[datasets.notes]", "[datasets.notes"), "cannot be read"),
    ],
)
def test_what_is_unsound_is_named(tmp_path, change, message):
    assert change[0] in GOOD
    with pytest.raises(InvalidInput, match=message):
        load(tmp_path, GOOD.replace(*change))


def test_a_larger_delta_needs_a_word_and_a_group_one_budget(tmp_path):
    large = GOOD + "target-delta = 2e-5\naccept-large-delta = true\n"
    assert load(tmp_path, large).datasets["notes"].target_delta == 2e-5
    group = 'group = "patients"\n'
    other = "[datasets.labs]\ndeclared-records = 12000\ntarget-epsilon = 3.0\n"
    with pytest.raises(InvalidInput, match="group patients"):
        load(tmp_path, GOOD + group + other + group)
    load(tmp_path, GOOD + group + other.replace("3.0", "8.0") + group)


def run(*arguments):
    app = typer.Typer()
    app.add_typer(policy_app)
    register_budget(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_init_writes_a_policy_that_check_accepts(tmp_path):
    path = tmp_path / "policy.toml"
    options = ("--dataset", "my notes", "--declared-records", 5000, "--coordinator-key", KEY, "--accountant-key", KEY)
    result = run("policy", "init", path, "--organisation", 'Clinic "A"', *options)
    assert result.exit_code == 0, result.output
    policy = Policy.load(path)
    assert policy.organisation == 'Clinic "A"'
    assert policy.datasets["my notes"].declared_records == 5000
    data = tmp_path / "notes.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    result = run("policy", "check", path, "--data", f"my notes={data}", "--json")
    found = json.loads(result.output)
    assert any("30 records, declared 5000" in warning for warning in found["warnings"])
    assert any("no backbone" in warning for warning in found["warnings"])
    assert "warning: no anchor" in run("policy", "check", path).output
    assert isinstance(run("policy", "init", path, "--organisation", "x", *options).exception, InvalidInput)
    assert isinstance(run("policy", "check", path, "--data", f"other={data}").exception, InvalidInput)
    assert isinstance(run("policy", "check", path, "--data", "other").exception, InvalidInput)
    named = tmp_path / "named.toml"
    run("policy", "init", named, "--organisation", "x", "--backbone", "ab", "--backbone", "cd", *options)
    assert Policy.load(named).backbones == ("ab", "cd")
    spoiled = tmp_path / "spoiled.toml"
    bad = run("policy", "init", spoiled, "--organisation", "x", "--target-epsilon", -1, *options)
    assert isinstance(bad.exception, InvalidInput)
    assert not spoiled.exists()


def test_a_policy_with_everything_set_is_warned_of_timing_alone(tmp_path):
    (tmp_path / "policy.toml").write_text(GOOD)
    (warning,) = check_policy_file(tmp_path / "policy.toml")["warnings"]
    assert "when replies leave" in warning


def test_budget_shows_what_is_left_while_the_trainer_runs(parties, guard, tmp_path):
    shapes = {"a.lora_B": (4, 2), "b.lora_B": (3, 2)}
    guard.admit(parties.request(), shapes=shapes)
    path = tmp_path / "policy.toml"
    path.write_text(GOOD.replace("12000", "1000").replace("8.0", "2.0"))
    found = budgets(path, parties.folder / "own.sqlite")["notes"]
    assert found == guard.spent("notes")
    assert 0 < found.left < 2.0
    result = run("budget", "--policy", path, "--ledger", parties.folder / "own.sqlite", "--json")
    assert json.loads(result.output)["notes"]["left"] == pytest.approx(found.left)
    assert "left" in run("budget", "--policy", path, "--ledger", parties.folder / "own.sqlite").output
