"""Settings: one definition, unknown names refused with the nearest known one, δ kept small."""

import json
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from common.config import (
    ClientSettings,
    RunConfig,
    check_delta,
    dashed,
    default_delta,
    round_to_two_digits,
)
from common.errors import InvalidInput
from deploy.cli import app


def simulate_options() -> dict[str, object]:
    command = typer.main.get_command(app).commands["simulate"]
    return {name: option for option in command.params for name in option.opts}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("name", list(RunConfig.model_fields))
def test_every_setting_is_described_and_is_an_option_of_the_same_name(name):
    assert name == "clients" or RunConfig.model_fields[name].description
    options = simulate_options()
    if name != "clients":
        assert f"--{dashed(name)}" in options
        assert options[f"--{dashed(name)}"].help


@pytest.mark.parametrize("name", list(ClientSettings.model_fields))
def test_every_setting_of_a_client_is_described(name):
    assert ClientSettings.model_fields[name].description


@pytest.mark.parametrize("option", ["--config", "--json"])
def test_simulate_has_the_options_that_are_no_settings(option):
    assert option in simulate_options()


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("target-epsilom", "target-epsilon"), ("target_epsilonn", "target-epsilon"), ("round", "rounds"),
        ("clipping-nrom", "clipping-norm"), ("sever-optimizer", "server-optimizer"), ("lora-alfa", "lora-alpha"),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_refused_and_the_nearest_known_is_named(key, near):
    with pytest.raises(InvalidInput, match=f"unknown setting '{dashed(key)}': did you mean '{near}'"):
        RunConfig.from_mapping({key: 3})


def test_an_unknown_setting_that_is_near_nothing_lists_the_known_ones():
    with pytest.raises(InvalidInput, match=r"known are data, eval-data, .*clients"):
        RunConfig.from_mapping({"zzzzzz": 1})


def test_an_unknown_setting_of_a_client_is_named_with_the_clients_own_name(tmp_path):
    path = write(tmp_path, "[clients.north_clinic]\ntarget-epsilom = 3\n")
    with pytest.raises(InvalidInput, match=r"'clients\.north_clinic\.target-epsilom': did you mean 'target-epsilon'"):
        RunConfig.load(path, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target-epsilon", 0), ("target-epsilon", -1), ("target-epsilon", float("inf")),
        ("target-epsilon", float("nan")), ("target-delta", 0), ("target-delta", 1), ("rounds", 0), ("rounds", 2.5),
        ("holdout", 1.0), ("clipping-norm", 0), ("noise-multiplier", 0), ("task", "translation"), ("seed", -1),
        ("server-optimizer", "lion"), ("backend", "spark"), ("silos", 0), ("max-length", 1), ("clients", {"a": 3}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(InvalidInput, match=key):
        RunConfig.from_mapping({key: value})


def test_a_file_gives_settings_and_clients_and_the_command_line_wins(tmp_path):
    path = write(
        tmp_path,
        'rounds = 5\ntarget-epsilon = 3.0\ntarget_modules = ["q_proj", "v_proj"]\n'
        "[clients.a]\ntarget-epsilon = 1.0\ndeclared-records = 900\n[clients.b]\nnoise-multiplier = 2.0\n",
    )
    config = RunConfig.load(path, {"rounds": 7})
    assert (config.rounds, config.target_epsilon, config.target_modules) == (7, 3.0, ("q_proj", "v_proj"))
    assert config.for_client("a").target_epsilon == 1.0
    assert config.for_client("a").declared_records == 900
    assert config.for_client("b").noise_multiplier == 2.0
    assert config.for_client("b").target_epsilon == 3.0
    assert config.for_client("c").target_epsilon == 3.0


def test_a_clients_own_epsilon_wins_over_the_runs_noise():
    config = RunConfig.from_mapping({"noise-multiplier": 1.0, "clients": {"a": {"target-epsilon": 2.0}}})
    assert config.for_client("a").noise_multiplier is None
    assert config.for_client("b").noise_multiplier == 1.0


@pytest.mark.parametrize("text", ["rounds = ", "rounds = 3\nrounds = 4", "\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path, text):
    with pytest.raises(InvalidInput, match=r"run\.toml.*not a TOML file"):
        RunConfig.load(write(tmp_path, text), {})


def test_a_file_that_is_not_utf_8_or_missing_is_named(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(InvalidInput, match=r"run\.toml.*cannot be read"):
        RunConfig.load(path, {})
    path.write_bytes(b'data = "\xff"')
    with pytest.raises(InvalidInput, match=r"run\.toml.*not a TOML file"):
        RunConfig.load(path, {})


def test_settings_are_frozen_and_survive_json():
    config = RunConfig.from_mapping({"rounds": 3, "clients": {"a": {"target-epsilon": 2}}, "target-modules": "q, v"})
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 4
    body = json.loads(json.dumps(config.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    again = RunConfig.from_mapping(body)
    assert again == config
    assert again.model_fields_set == config.model_fields_set


@given(st.integers(1, 10**9))
def test_a_published_count_is_never_larger_and_loses_less_than_a_tenth(count):
    rounded = round_to_two_digits(count)
    assert rounded <= count
    assert count - rounded < max(1, count / 10)
    assert len(str(rounded).rstrip("0")) <= 2 or count < 100


@given(st.integers(1, 10**7))
def test_the_default_delta_is_small_against_a_records_share_and_always_allowed(declared):
    delta = default_delta(declared)
    assert delta == min(1e-5, 0.1 / declared)
    assert check_delta(delta, declared, allow_large=False, client="a") == delta


@given(st.integers(2, 10**6), st.booleans())
def test_a_delta_that_permits_publishing_a_record_is_refused_whatever_is_allowed(declared, allow):
    with pytest.raises(InvalidInput, match="publishing"):
        check_delta(1 / declared, declared, allow_large=allow, client="a")


def test_a_delta_above_the_default_needs_the_flag():
    with pytest.raises(InvalidInput, match="--allow-large-delta"):
        check_delta(2e-5, 1000, allow_large=False, client="a")
    assert check_delta(2e-5, 1000, allow_large=True, client="a") == 2e-5
