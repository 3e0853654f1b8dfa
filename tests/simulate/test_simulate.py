"""``cloister simulate`` from the command line to the last file it writes."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from client.backbone import load_model
from common.certificate import Certificate
from common.config import RunConfig
from common.privacy import PLDAccountant, SampledGaussian
from common.statement import what_epsilon_means, who_is_protected
from deploy.simulation.simulate import quiet_warnings, simulate

WRITTEN = {"adapter", "certificate.json", "metrics.jsonl", "ledger.sqlite", "report.html", "state"}


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]


def certificate(output: Path) -> Certificate:
    return Certificate.from_json(json.loads((output / "certificate.json").read_text("utf-8"))["certificate"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options) -> SimpleNamespace:
    """One private run of three rounds, in this process; ``seen``: the metrics file as it stood after each round."""
    from deploy.simulation.simulate import Watcher

    output = tmp_path_factory.mktemp("finished") / "run"
    seen = []

    class Reader(Watcher):
        def round_ended(self, record):
            seen.append([line["round"] for line in metrics(output)])

    with quiet_warnings():
        result = simulate(RunConfig.from_mapping(options(output, target_epsilon=4.0)), Reader())
    return SimpleNamespace(output=output, result=result, seen=seen)


def test_a_run_writes_what_the_design_says_and_nothing_else(finished):
    assert set(os.listdir(finished.output)) == WRITTEN
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "cloister.json"} == set(
        os.listdir(finished.output / "adapter")
    )
    assert not [file for file in finished.output.rglob("*") if file.name.endswith((".tmp", ".new"))]


def test_metrics_are_complete_after_every_round(finished):
    assert finished.seen == [list(range(n + 1)) for n in range(4)]
    lines = metrics(finished.output)
    for line in lines:
        assert set(line) == {"round", "score", "loss", "epsilon", "seconds"}
        assert 0 <= line["score"] <= 1
        assert set(line["epsilon"]) == {"east", "north", "south"}
    assert lines[0]["epsilon"] == {"east": 0.0, "north": 0.0, "south": 0.0}


def test_epsilon_is_the_plds_below_the_target_and_rises(finished):
    terms, lines = finished.result.terms, metrics(finished.output)
    for client in terms.clients:
        spent = [line["epsilon"][client.name] for line in lines]
        events = client.envelope.events
        again = [PLDAccountant().compose_all(events[:n]).epsilon(client.target_delta) if n else 0.0 for n in range(4)]
        assert spent == pytest.approx(again, rel=1e-9)
        assert spent == sorted(spent)
        assert 3.8 < spent[-1] <= 4.0


def test_the_adapter_loads_with_stock_peft_and_gives_the_reported_score(finished, cloister, material, tiny_llama):
    from peft import PeftModel

    with quiet_warnings():
        base = load_model(tiny_llama, task="causal-lm")
        before = base(torch.arange(3, 20)[None]).logits
        adapted = PeftModel.from_pretrained(base, str(finished.output / "adapter")).eval()
    assert not torch.equal(adapted(torch.arange(3, 20)[None]).logits, before), "three rounds moved the adapter"
    found = cloister("evaluate", "--adapter", finished.output / "adapter", "--eval-data", material.public, "--json")
    assert found.code == 0, found.err
    scored, last = json.loads(found.out), metrics(finished.output)[-1]
    assert scored["score"] == pytest.approx(last["score"], abs=1e-9)
    assert scored["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_the_adapter_answers_a_prompt(finished, cloister):
    arguments = ("generate", "--adapter", finished.output / "adapter", "--prompt", "colour 3", "--max-new-tokens", "4")
    found = cloister(*arguments, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["prompt"] == "colour 3"
    assert cloister(*arguments).code == 0


def test_the_certificate_verifies_and_says_what_holds(finished, cloister):
    file = finished.output / "certificate.json"
    found = cloister("certificate", "verify", file)
    assert found.code == 0, found.err + found.out
    issued = certificate(finished.output)
    assert issued.private
    assert issued.simulation
    assert issued.rounds_run == issued.rounds_planned == 3
    assert {item.part.relation for item in issued.parts} == {"zero_out"}, "sizes follow from the data"
    assert any("zero_out" in note for note in issued.notes)


def test_one_changed_number_in_a_certificate_is_seen(finished, cloister, tmp_path):
    text = (finished.output / "certificate.json").read_text("utf-8")
    changed = tmp_path / "certificate.json"
    changed.write_text(text.replace('"rounds_run":3', '"rounds_run":2').replace('"rounds_run": 3', '"rounds_run": 2'))
    assert changed.read_text() != text
    assert cloister("certificate", "verify", changed).code != 0


def test_model_card_and_report_carry_the_privacy_statement(finished):
    card = (finished.output / "adapter" / "README.md").read_text("utf-8")
    page = (finished.output / "report.html").read_text("utf-8")
    issued = certificate(finished.output)
    for text in (card, html.unescape(page)):
        assert "zero_out" in text
        assert finished.result.terms.run_id in text
        assert who_is_protected(issued) in text
        assert what_epsilon_means(issued, issued.epsilons) in text
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_private_files_are_for_their_owner_alone(finished):
    state = finished.output / "state"
    assert state.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in (state / "keys").iterdir())


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(finished, cloister, options):
    before = metrics(finished.output)
    found = cloister("simulate", "--resume", "--json", output=finished.output)
    assert found.code == 0, found.err
    assert metrics(finished.output) == before
    assert json.loads(found.out)["epsilon"] == before[-1]["epsilon"]


def test_resuming_with_other_settings_is_refused(finished, cloister):
    found = cloister("simulate", "--resume", output=finished.output, rounds=5)
    assert found.code == 2
    assert "rounds = 5, but the run was started with 3" in found.err
    found = cloister("simulate", "--resume", output=finished.output, target_epsilon=80)
    assert found.code == 2


def test_a_folder_in_use_is_not_overwritten(finished, cloister, options):
    before = metrics(finished.output)
    found = cloister("simulate", **options(finished.output))
    assert found.code == 2
    assert "--resume" in found.err
    assert metrics(finished.output) == before


def test_the_command_prints_one_json_object_and_nothing_else(tmp_path, options):
    """In a process of its own, as a script would call it."""
    arguments = [part for name, value in options(tmp_path / "run", rounds=1).items()
                 for part in ("--" + name.replace("_", "-"), str(value))]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "simulate", "--json", *arguments],
        capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["private"] is True
    assert body["rounds"] == 1
    assert set(body["epsilon"]) == set(body["delta"]) == {"east", "north", "south"}
    assert (body["unit"], body["sampler"], body["relation"]) == ("record", "poisson", "zero_out")


def test_plain_lines_and_a_closing_table_where_there_is_no_terminal(tmp_path, cloister, options):
    found = cloister("simulate", **options(tmp_path / "run [old]", rounds=2))
    assert found.code == 0, found.err
    assert "round 2/2" in found.out
    assert "δ = " in found.out
    assert "run [old]" in found.out.replace("\n", ""), "a folder's name is no markup"
    assert "\x1b[" not in found.out


@pytest.mark.parametrize(("setting", "words"), [({"no_privacy": True}, "--no-privacy"), ({"seed": 1}, "--seed")])
def test_what_is_not_private_says_so_everywhere(tmp_path, cloister, options, setting, words):
    output = tmp_path / "run"
    found = cloister("simulate", **options(output, rounds=1, **setting))
    assert found.code == 0, found.err
    assert "not private" in found.out
    issued = certificate(output)
    assert not issued.private
    assert words in " ".join(issued.reasons)
    assert "not private" in (output / "adapter" / "README.md").read_text("utf-8").lower()
    assert "not private" in (output / "report.html").read_text("utf-8").lower()
    verified = cloister("certificate", "verify", output / "certificate.json")
    assert verified.code == 0, "consistent, and it says what it is"
    assert "not private" in (verified.out + verified.err).lower()
    assert (metrics(output)[-1]["epsilon"] is None) == ("no_privacy" in setting)


def test_a_public_seed_alone_stays_private(tmp_path, cloister, options):
    assert cloister("simulate", **options(tmp_path / "run", rounds=1, public_seed=3)).code == 0
    assert certificate(tmp_path / "run").private


def test_one_seed_gives_one_adapter_and_without_it_noise_differs(tmp_path, options):
    def adapter(name, **changes):
        with quiet_warnings():
            simulate(RunConfig.from_mapping(options(tmp_path / name, rounds=1, **changes)))
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    assert adapter("a", seed=1) == adapter("b", seed=1)
    assert adapter("c") != adapter("d")


def test_organisations_may_have_budgets_of_their_own(tmp_path, cloister, options):
    file = tmp_path / "run.toml"
    file.write_text("target-epsilon = 5.0\n[clients.north]\ntarget-epsilon = 1.0\ndeclared-records = 75\n")
    found = cloister("simulate", "--config", file, "--json", **options(tmp_path / "run"))
    assert found.code == 0, found.err
    epsilon = json.loads(found.out)["epsilon"]
    assert 0.9 < epsilon["north"] <= 1.0
    assert 4.5 < epsilon["south"] <= 5.0
    parts = {item.part.client: item.part for item in certificate(tmp_path / "run").parts}
    assert parts["north"].declared_records == 75
    assert parts["north"].target_epsilon == 1.0


def test_an_exhausted_organisation_leaves_and_the_run_goes_on(tmp_path, cloister, options):
    event = SampledGaussian(noise_multiplier=1.0, sample_rate=8 / 80, steps=1)
    target = PLDAccountant().compose_all([event] * 3).epsilon(1e-5) + 0.01  # three rounds of five fit
    file = tmp_path / "run.toml"
    file.write_text(f"noise-multiplier = 1.0\n[clients.north]\nnoise-multiplier = 1.0\ntarget-epsilon = {target}\n")
    output = tmp_path / "run"
    found = cloister("simulate", "--config", file, **options(output, rounds=5))
    assert found.code == 0, found.err
    assert "north leaves" in found.out
    lines = metrics(output)
    assert len(lines) == 6
    spent = [line["epsilon"]["north"] for line in lines]
    assert spent[2] < spent[3] == spent[4] == spent[5] <= target
    assert lines[-1]["epsilon"]["south"] > lines[-2]["epsilon"]["south"]
    parts = {item.part.client: item.part for item in certificate(output).parts}
    assert (len(parts["north"].rounds), len(parts["south"].rounds)) == (3, 5)
    assert cloister("certificate", "verify", output / "certificate.json").code == 0


def test_rows_set_aside_are_said_to_be_public(tmp_path, cloister, options):
    output = tmp_path / "run"
    found = cloister("simulate", **options(output, rounds=1, eval_data=None, holdout=0.1))
    assert found.code == 0, found.err
    assert "21 records are set aside" in found.out
    assert any("21 records" in note and "not covered" in note for note in certificate(output).notes)
    assert "not covered" in (output / "report.html").read_text("utf-8").replace("\n", " ")


def test_without_a_public_set_the_score_is_empty_and_said_to_be(tmp_path, cloister, options):
    found = cloister("simulate", **options(tmp_path / "run", rounds=1, eval_data=None))
    assert found.code == 0, found.err
    assert "no public evaluation set" in found.out
    assert [line["score"] for line in metrics(tmp_path / "run")] == [None, None]


def test_a_classifier_keeps_its_classes_and_gives_the_reported_score(tmp_path, cloister, options, material, tiny_bert):
    output = tmp_path / "run"
    found = cloister(
        "simulate", "--pooling", "mean",
        **options(output, rounds=2, task="classification", model=tiny_bert, target_modules=None),
    )  # fmt: skip
    assert found.code == 0, found.err
    assert json.loads((output / "adapter" / "cloister.json").read_text())["classes"] == ["n", "p"]
    assert any("names of the classes" in note and "not covered" in note for note in certificate(output).notes)
    found = cloister("evaluate", "--adapter", output / "adapter", "--eval-data", material.public, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["score"] == pytest.approx(metrics(output)[-1]["score"], abs=1e-9)


def test_a_random_split_and_a_column_give_silos(tmp_path, cloister, options, material):
    split = cloister("simulate", "--json", **options(tmp_path / "a", rounds=1, data=material.one, silos=2))
    assert set(json.loads(split.out)["epsilon"]) == {"silo-1", "silo-2"}
    column = cloister(
        "simulate", "--json", "--only-silos", "east,south",
        **options(tmp_path / "b", rounds=1, data=material.one, silo_column="silo"),
    )  # fmt: skip
    assert any("read from the column silo" in note for note in certificate(tmp_path / "b").notes)
    assert not any("column" in note for note in certificate(tmp_path / "a").notes)
    assert set(json.loads(column.out)["epsilon"]) == {"east", "south"}


def test_the_opacus_engine_gives_the_same_update(tmp_path, options):
    found = {}
    for engine in ("fused", "opacus"):
        with quiet_warnings():
            simulate(RunConfig.from_mapping(options(tmp_path / engine, rounds=1, seed=1, engine=engine)))
        from safetensors.numpy import load_file

        found[engine] = load_file(tmp_path / engine / "adapter" / "adapter_model.safetensors")
    for name, array in found["fused"].items():
        np.testing.assert_allclose(array, found["opacus"][name], rtol=1e-3, atol=1e-5)


def bad_file(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def two_files(folder: Path, first: bytes, second: bytes) -> Path:
    bad_file(folder, "a.jsonl", first)
    bad_file(folder, "b.jsonl", second)
    return folder


BAD = {
    "a missing file": (lambda f: {"data": f / "none.jsonl"}, "no such file"),
    "a missing evaluation file": (lambda f: {"eval_data": f / "none.jsonl"}, "no such file"),
    "a missing column": (lambda f: {"prompt_column": "question"}, "no column 'question' .*there are 'prompt'"),
    "a missing silo column": (lambda f: {"silo_column": "ward"}, "no column 'ward'.*there are 'prompt'"),
    "an empty silo": (
        lambda f: {"data": two_files(f, b"", b'{"prompt":"a","completion":"b"}\n')},
        "silo 'a' holds no rows",
    ),
    "no completion token anywhere": (
        lambda f: {"data": bad_file(f, "d.jsonl", b'{"prompt":"a","completion":""}\n' * 8), "silos": 2},
        "silo 'silo-1': none of its 4 records keeps a completion token",
    ),
    "not UTF-8": (lambda f: {"data": bad_file(f, "d.jsonl", b'{"prompt":"\xff"}\n')}, r"d\.jsonl, line 1: not UTF-8"),
    "not JSON": (lambda f: {"data": bad_file(f, "d.jsonl", b'{"prompt":\n')}, r"d\.jsonl, line 1: not JSON"),
    "an epsilon of 0": (lambda f: {"target_epsilon": 0}, "target-epsilon = 0"),
    "a negative epsilon": (lambda f: {"target_epsilon": -3}, "target-epsilon = -3"),
    "a delta that publishes": (lambda f: {"target_delta": 0.05}, "publishing somebody's whole record"),
    "a large delta": (lambda f: {"target_delta": 1e-3}, "--allow-large-delta"),
    "an unknown key": (
        lambda f: {"config": bad_file(f, "run.toml", b"target-epsilom = 3\n")},
        "unknown setting 'target-epsilom': did you mean 'target-epsilon'",
    ),
    "an unknown client": (
        lambda f: {"config": bad_file(f, "run.toml", b"[clients.west]\ntarget-epsilon = 3\n")},
        r"\[clients\.west\]: no such client; there are east, north, south",
    ),
    "a broken TOML": (lambda f: {"config": bad_file(f, "run.toml", b"a = [\n")}, "not a TOML file"),
    "no such module": (lambda f: {"target_modules": "q_prj"}, "no module 'q_prj' in this model: could be q_proj"),
    "no such model": (lambda f: {"model": f / "none"}, "no such model folder"),
    "no such silo": (lambda f: {"only_silos": "west"}, "no silo 'west'; there are east, north, south"),
    "a batch above the silo": (lambda f: {"expected_batch_size": 5000}, "expected-batch-size 5000 is above"),
    "a rank of 0": (lambda f: {"rank": 0}, "rank = 0"),
    "text for a number": (lambda f: {"rounds": "many"}, "many"),
    "an unknown choice": (lambda f: {"server_optimizer": "lion"}, "server-optimizer = 'lion'"),
    "no place in the budget": (lambda f: {"noise_multiplier": 0.3, "target_epsilon": 0.1}, "not even one round"),
    "an evaluation set without completions": (
        lambda f: {"eval_data": bad_file(f, "e.jsonl", b'{"prompt":"a","completion":""}\n')},
        "the evaluation set keeps no completion token",
    ),
    "one class only": (
        lambda f: {"task": "classification", "eval_data": None}
        | {"data": bad_file(f, "d.jsonl", b'{"text":"a","label":"x"}\n' * 8)},
        "one class only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_exit_code_2_and_leaves_no_folder(tmp_path, cloister, options, case):
    change, message = BAD[case]
    (tmp_path / "in").mkdir()
    output = tmp_path / "out" / "run"
    found = cloister("simulate", **options(output, **change(tmp_path / "in")))
    assert found.code == 2, found.err
    text = " ".join(found.err.replace("│", " ").split())
    assert re.search(message, text), text
    assert "Traceback" not in found.err
    assert not output.parent.exists()


def test_an_output_that_is_a_file_is_refused(tmp_path, cloister, options):
    file = tmp_path / "run"
    file.write_text("mine")
    found = cloister("simulate", **options(file))
    assert found.code == 2
    assert "is a file" in found.err
    found = cloister("simulate", **options(file / "below"))
    assert found.code == 2
    assert file.read_text() == "mine"


def test_resuming_nothing_is_refused(tmp_path, cloister):
    assert cloister("simulate", "--resume").code == 2
    found = cloister("simulate", "--resume", output=tmp_path / "none")
    assert found.code == 2
    assert "no run to resume" in found.err
    assert not (tmp_path / "none").exists()


def test_debug_shows_the_traceback(tmp_path, monkeypatch, options):
    from common.errors import InvalidInput
    from deploy import cli

    monkeypatch.setattr(sys, "argv", ["cloister", "--debug", "simulate", "--data", str(tmp_path / "none.jsonl"),
                                      "--model", str(options(None)["model"])])  # fmt: skip
    with pytest.raises(InvalidInput):
        cli.main()


def test_a_record_cut_or_set_aside_is_told_to_the_organisation(tmp_path, cloister, options):
    good = [{"prompt": "a", "completion": "b"}] * 30
    odd = [{"prompt": "a", "completion": "x" * 200}] * 2 + [{"prompt": "a", "completion": ""}] * 3
    (tmp_path / "in").mkdir()
    for name in ("east", "west"):
        file = tmp_path / "in" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in (good + odd if name == "east" else good)))
    found = cloister("simulate", **options(tmp_path / "run", rounds=1, data=tmp_path / "in"))
    assert found.code == 0, found.err
    assert "east: 2 of 32 records are longer than the context and are cut" in found.out
    assert "east: 3 records keep no completion token and are set aside" in found.out
    assert "west: " not in found.out


def test_a_silos_name_is_no_markup(tmp_path, cloister, options):
    rows = [
        {"prompt": "a", "completion": "b", "ward": name} for name in ("[/red]", "[bold]x", "a/../b") for _ in range(30)
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cloister("simulate", **options(tmp_path / "run", rounds=1, data=file, silo_column="ward", eval_data=None))
    assert found.code == 0, found.err
    assert "[/red]" in found.out
    assert set(metrics(tmp_path / "run")[-1]["epsilon"]) == {"[/red]", "[bold]x", "a/../b"}
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "run"], "a silo's name is no path"


def test_a_run_that_is_still_going_is_not_resumed_beside_itself(finished, cloister):
    from client.journal import lock_exclusively

    release = lock_exclusively(finished.output / "state" / "clients" / "0002" / "ledger.sqlite.lock")
    try:
        found = cloister("simulate", "--resume", output=finished.output)
    finally:
        release()
    assert found.code == 5
    assert "another trainer uses this ledger" in found.err
    assert cloister("simulate", "--resume", output=finished.output).code == 0
