"""Methods in a whole run: noised, charged as planned, attested by every organisation, and named in the certificate."""

import json

import numpy as np
import pytest
from peft import PeftModel

from client.backbone import load_model
from common.certificate import verify_certificate
from common.charge import charge
from common.config import RunConfig
from common.errors import InvalidInput
from deploy.simulation.simulate import quiet_warnings, simulate

MIXES = {
    "adaptive, importance, by turns": {
        "clipping": "adaptive", "noise-allocation": "importance", "aggregation": "rolora", "averaging": "tail",
        "noise-schedule": "lr-matched", "server-schedule": "linear", "rounds": 5,
    },
    "automatic, least energy, shrunk": {
        "clipping": "automatic", "noise-allocation": "min-energy", "shrinkage": "spectral",
        "smoothing": "laplacian:0.5", "noise-schedule": "cosine", "weights": "inverse-variance", "local-steps": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_run_with_methods_pays_its_plan_and_says_so(tmp_path, options, mix):
    settings = {name.replace("-", "_"): value for name, value in mix.items()}
    own = {"east": {"target-epsilon": 2.0, "clipping-norm": 0.5, "local-steps": 1}}
    config = RunConfig.from_mapping(options(tmp_path / "run", target_epsilon=4.0, **settings) | {"clients": own})
    with quiet_warnings():
        result = simulate(config)
    verdict = verify_certificate(tmp_path / "run" / "certificate.json")
    assert verdict.private
    name = f"{mix['clipping']}/{mix['noise-allocation']}"
    for item in verdict.certificate.parts:
        part, client = item.part, result.terms.client(item.part.client)
        assert part.mechanism == name
        assert part.clipping_norm == client.clipping_norm
        assert [one.event for one in part.rounds] == list(client.envelope.events)
        assert len({event.noise_multiplier for event in client.envelope.events}) > 1
        planned = charge(client.envelope.events, relation=part.relation, delta=part.delta).epsilon
        assert verdict.epsilons[part.client].epsilon == pytest.approx(planned, abs=1e-9)
        assert result.metrics[-1]["epsilon"][part.client] == pytest.approx(planned, abs=1e-9)
        assert 0.98 * client.target_epsilon < planned <= client.target_epsilon
    assert verdict.certificate.noise_schedule == mix["noise-schedule"]
    assert verdict.certificate.methods["clipping"] == mix["clipping"]
    assert verdict.certificate.methods["averaging"] == mix.get("averaging", "none")


def test_methods_agree_on_one_process_and_when_resumed(tmp_path, options):
    """The same seed, once straight and once killed in the middle: importance, C and the average go on."""
    settings = {
        "clipping": "adaptive", "noise_allocation": "importance", "averaging": "tail", "rounds": 5, "seed": 3,
        "target_epsilon": 4.0,
    }  # fmt: skip

    class Killed(Exception):
        pass

    def run(name, *, killed_after=None, resume=False):
        from deploy.simulation.simulate import Watcher

        class Killer(Watcher):
            def round_ended(self, record):
                if record["round"] == killed_after:
                    raise Killed

        values = {"output": str(tmp_path / name), "resume": True} if resume else options(tmp_path / name, **settings)
        with quiet_warnings():
            return simulate(RunConfig.from_mapping(values), Killer())

    run("straight")
    with pytest.raises(Killed):
        run("killed", killed_after=3)
    run("killed", resume=True)

    def lines(name):
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        return [(line["score"], line["loss"]) for line in found]

    np.testing.assert_array_equal(lines("straight"), lines("killed"))


def test_lora_on_embeddings_is_trained_through_opacus_and_saved(tmp_path, options, tiny_llama):
    """The fused engine refuses it by name, before data is opened, and names the way out."""
    settings = {"target_modules": "embed_tokens,q_proj", "rounds": 2, "target_epsilon": 4.0}
    with quiet_warnings(), pytest.raises(InvalidInput, match=r'embed_tokens.*engine = "opacus"'):
        simulate(RunConfig.from_mapping(options(tmp_path / "fused", **settings)))
    with quiet_warnings():
        result = simulate(RunConfig.from_mapping(options(tmp_path / "run", engine="opacus", **settings)))
        adapted = PeftModel.from_pretrained(load_model(tiny_llama, task="causal-lm"), str(tmp_path / "run" / "adapter"))
    assert all(0.9 * 4.0 < epsilon <= 4.0 for epsilon in result.metrics[-1]["epsilon"].values())
    moved = {name for name, p in adapted.named_parameters() if ("lora_B" in name or "embedding_A" in name) and p.any()}
    assert len(moved) == 3, "the embedding's A and the queries' B of two layers left zero"
