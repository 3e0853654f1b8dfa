"""``--subspace`` in a whole run: paid as planned, named in recipe and certificate; no basis from private rows."""

import pytest

from common.certificate import verify_certificate
from common.config import RunConfig
from common.errors import InvalidInput
from deploy.simulation.simulate import quiet_warnings, simulate
from deploy.workshop import refuse_same_file


def run(values):
    with quiet_warnings():
        return simulate(RunConfig.from_mapping(values))


@pytest.mark.parametrize("kind", ["random", "public"])
def test_a_run_in_a_subspace_pays_its_plan_and_names_it(tmp_path, options, material, kind):
    more = {"subspace_data": str(material.public)} if kind == "public" else {}
    result = run(options(tmp_path / "run", subspace=kind, subspace_dimension=7, target_epsilon=4.0, rounds=2, **more))
    verdict = verify_certificate(tmp_path / "run" / "certificate.json")
    assert verdict.private
    named = verdict.certificate.methods["subspace"]
    assert named.startswith(f"{kind}:7")
    assert (len(named.split(":")) == 3) == (kind == "public"), "a public basis is named by its rows"
    assert result.terms.recipe["subspace"] == kind
    uncovered = [item for item in verdict.certificate.not_protected if "subspace" in item]
    assert len(uncovered) == (kind == "public"), "a reader hears that no ε covers the rows behind the basis"
    assert all(0.9 * 4.0 < epsilon <= 4.0 for epsilon in result.metrics[-1]["epsilon"].values())


def test_private_rows_are_refused_as_the_basis(tmp_path, options, material):
    own = {"subspace": "public", "subspace_dimension": 7}
    with pytest.raises(InvalidInput, match="records' own file"):
        run(options(tmp_path / "run", subspace_data=str(material.data / "east.jsonl"), **own))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((material.data / "east.jsonl").read_bytes())
    with pytest.raises(InvalidInput, match="also private records"):
        run(options(tmp_path / "run", subspace_data=str(copy), **own))


def test_a_copy_of_all_silos_is_refused_though_no_silo_has_most_of_its_rows(tmp_path, options, material):
    copy = tmp_path / "all.jsonl"
    copy.write_bytes(b"".join(file.read_bytes() for file in sorted(material.data.glob("*.jsonl"))))
    settings = {"subspace": "public", "subspace_dimension": 7, "subspace_data": str(copy)}
    with pytest.raises(InvalidInput, match="also private records"):
        run(options(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_folder_around_the_records_is_refused(tmp_path):
    (tmp_path / "all" / "own").mkdir(parents=True)
    (tmp_path / "all" / "own" / "records.jsonl").touch()
    (tmp_path / "other.jsonl").touch()
    private = str(tmp_path / "all" / "own" / "records.jsonl")
    for public in (tmp_path / "all", tmp_path / "all" / "own"):
        with pytest.raises(InvalidInput, match="records' own file"):
            refuse_same_file(str(public), private)
        with pytest.raises(InvalidInput, match="records' own file"):
            refuse_same_file(private, str(public))
    refuse_same_file(str(tmp_path / "other.jsonl"), private)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"subspace": "public"}, "belong together"),
        ({"subspace_data": "rows.jsonl"}, "belong together"),
        ({"subspace": "random", "noise_allocation": "min-energy"}, "mixes the adapter's modules"),
        ({"subspace": "random", "shrinkage": "spectral"}, "mixes the adapter's modules"),
        ({"subspace": "random", "subspace_dimension": 129}, "subspace-dimension"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, options, settings, why):
    with pytest.raises(InvalidInput, match=why):
        run(options(tmp_path / "run", **({"subspace_dimension": 7} | settings)))
