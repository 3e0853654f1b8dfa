"""``--cache-frozen-layers`` in a whole run: the same figures, once per record; states are the process's own."""

import pytest

from client.engine import FrozenStates
from common.config import RunConfig
from common.errors import InvalidInput
from deploy.simulation.simulate import quiet_warnings, simulate

LAST = "layers.1.self_attn.q_proj,layers.1.self_attn.v_proj"


def run(config, **more):
    with quiet_warnings():
        return simulate(RunConfig.from_mapping(config), **more)


def test_a_run_with_kept_layers_is_the_run_without(tmp_path, options):
    settings = {"target_modules": LAST, "seed": 3, "target_epsilon": 4.0}
    whole = run(options(tmp_path / "whole", **settings))
    states = FrozenStates()
    kept = run(options(tmp_path / "kept", cache_frozen_layers=True, **settings), states=states)
    assert [line["score"] for line in kept.metrics] == [line["score"] for line in whole.metrics]
    for one, other in zip(kept.metrics, whole.metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    (found,) = states._kept.values()
    assert len(found) > 50, "every record's states are there, each once"
    state = next(iter(found.values())).numpy().tobytes()
    files = [file for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if state in file.read_bytes()], "and are written nowhere"


def test_refused_by_name_where_the_first_layer_is_trained(tmp_path, options):
    with pytest.raises(InvalidInput, match="cache-frozen-layers: the first layer of this model is trained"):
        run(options(tmp_path / "run", cache_frozen_layers=True))
