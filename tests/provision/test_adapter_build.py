"""``cloister adapter build``: the folder of a run becomes an adapter folder, if its certificate agrees."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from client.data import ColumnNames
from common.config import RunConfig
from common.errors import CloisterError, InvalidInput, Refused
from deploy.cli import app
from deploy.commands.adapter import build
from deploy.reporting.use import evaluate_adapter, load_adapted
from deploy.simulation.simulate import Watcher, simulate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with what a coordinator leaves there, from a simulation of one round."""
    folder = tmp_path_factory.mktemp("run")
    rows = [json.dumps({"prompt": f"which street is number {n}", "completion": f"street {n}"}) for n in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    values = {"rounds": 1, "expected_batch_size": 4, "max_length": 32, "rank": 2, "silos": 2, "target_epsilon": 20.0}
    paths = {"data": folder / "rows.jsonl", "eval_data": folder / "rows.jsonl", "output": folder / "simulated"}
    config = RunConfig.from_mapping({**values, **{name: str(path) for name, path in paths.items()}})
    simulate(config, Watcher())
    simulated = folder / "simulated"
    made = folder / "made"
    made.mkdir()
    (made / "run.toml").write_text("rounds = 1\nexpected-batch-size = 4\nmax-length = 32\nrank = 2\n")
    shutil.copyfile(simulated / "certificate.json", made / "certificate.json")
    model, _, _ = load_adapted(simulated / "adapter", None)
    trained = {name: parameter.detach().numpy() for name, parameter in model.named_parameters() if "lora_B" in name}
    np.savez(made / "adapter.npz", allow_pickle=False, **trained)
    return made, simulated


def test_it_is_the_adapter_that_a_simulation_writes(run, tmp_path):
    made, simulated = run
    build(made, "demo", tmp_path / "adapter")
    public = str(simulated.parent / "rows.jsonl")
    ours = evaluate_adapter(tmp_path / "adapter", public, None, ColumnNames(None, None, None))
    theirs = evaluate_adapter(simulated / "adapter", public, None, ColumnNames(None, None, None))
    assert ours == theirs
    assert "## Privacy" in (tmp_path / "adapter" / "README.md").read_text()
    certificate = (tmp_path / "adapter" / "certificate.json").read_bytes()
    assert certificate == (made / "certificate.json").read_bytes()


def test_another_adapter_certificate_backbone_or_folder_is_refused(run, tmp_path, tiny_llama):
    made, _ = run
    folder = shutil.copytree(made, tmp_path / "run")
    with pytest.raises((Refused, InvalidInput)):
        build(folder, str(tiny_llama), tmp_path / "out")
    with np.load(folder / "adapter.npz") as file:
        arrays = {name: file[name] for name in file.files}
    first = next(iter(arrays))
    np.savez(folder / "adapter.npz", **{**arrays, first: arrays[first] + 1e-3})
    with pytest.raises(Refused, match="speaks of"):
        build(folder, "demo", tmp_path / "out")
    body = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps(body)[:-40] + "}")
    with pytest.raises(CloisterError):
        build(folder, "demo", tmp_path / "out")
    (folder / "certificate.json").unlink()
    with pytest.raises(InvalidInput, match=r"certificate\.json: missing"):
        build(folder, "demo", tmp_path / "out")
    with pytest.raises(InvalidInput, match="exists"):
        build(made, "demo", folder)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_made(run, tmp_path):
    made, _ = run
    done = CliRunner().invoke(app, ["adapter", "build", str(made), "--model", "demo", "--output", str(tmp_path / "a")])
    assert done.exit_code == 0, done.exception
    assert "1 rounds" in done.output


def test_a_run_in_a_public_subspace_is_built_without_the_rows_behind_it(run, tmp_path):
    """Its settings say ``public``, as every trainer's do, and the rows are the organisations'."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "run.toml").write_text((folder / "run.toml").read_text("utf-8") + 'subspace = "public"\n', "utf-8")
    build(folder, "demo", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").exists()
