"""What a plan says of the memory of gradient rows is what the engine takes."""

import json

import pytest
from typer.testing import CliRunner

from common.config import RunConfig
from deploy.cli import app
from deploy.planning.memory import arena_bytes_per_record
from deploy.workshop import open_workshop


@pytest.mark.parametrize(
    "settings", [{}, {"aggregation": "fedavg", "rank": 3}, {"target-modules": "q_proj,down_proj", "rank": 2}]
)
def test_the_planned_bytes_are_the_engines(settings):
    config = RunConfig.from_mapping({"max-length": 16, **settings})
    workshop = open_workshop(config, (), test=False)
    assert arena_bytes_per_record(config) == workshop.workbench.engine.bytes_per_example


def test_a_backbone_that_is_elsewhere_has_no_answer(tmp_path):
    assert arena_bytes_per_record(RunConfig.from_mapping({"model": str(tmp_path / "none")})) is None


def test_the_plan_prints_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("rounds = 2\n[clients.a]\ndeclared-records = 100\n")
    shown = CliRunner().invoke(app, ["plan", "--config", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "Memory of gradient rows" in shown.output
    body = json.loads(CliRunner().invoke(app, ["plan", "--config", str(file), "--json"]).output)
    assert body["arena_bytes_per_record"] == arena_bytes_per_record(RunConfig()) > 0
