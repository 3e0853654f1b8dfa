"""Words that somebody else chose: what is no visible line is refused where it comes in, and shown escaped elsewhere."""

import csv
import io
import logging
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from client.policy import Policy
from common import logs, text
from common.attestation import PartRequest
from common.certificate import verify_certificate
from common.errors import InvalidInput, LedgerCorrupt
from common.history import Begun, ChargedRun, ClientHistory, ListRequest
from common.ledger import Ledger
from common.ledger_export import export_lines, read_export
from common.messages import Description, Envelope, Plan, Refusal, RefusalReason, Reply, Reservation
from common.pages import environment
from common.parts import Attested
from common.privacy import SampledGaussian
from common.signing import SigningKey, canonical
from deploy.cli import app
from deploy.commands.coordinator import make_home
from deploy.commands.logs import coloured
from deploy.reporting.statements import _inert
from deploy.simulation.terminal import Terminal
from server.deployed import RunFolder

KEY = SigningKey.generate()
EVENT = SampledGaussian(1.0, 0.01, 1)

UNSEEN = {
    "an escape sequence": "clinic\x1b[2J\x1b[1;31m-a",
    "a title sequence": "\x1b]0;owned\x07clinic-a",
    "one byte that begins a sequence": "clinic\x9b31m-a",
    "a line break": "clinic-a\nall is well",
    "a carriage return": "clinic-a\rclinic-b",
    "a line separator": "clinic-a\u2028all is well",
    "a next line": "clinic-a\x85all is well",
    "a null": "clinic-a\0",
    "a backspace": "clinic-b\b-a",
    "delete": "clinic\x7f-a",
    "a bidirectional override": "clinic-\u202ea-cinilc",
    "a bidirectional isolate": "\u2066clinic-a",
    "a zero-width space": "clinic\u200b-a",
    "a byte order mark": "\ufeffclinic-a",
    "a soft hyphen": "clinic\u00ad-a",
    "a tag character": "clinic-a\U000e0041",
    "a lone surrogate": "clinic-\ud800a",
    "a private character": "clinic-\ue000a",
}
MARKUP = ("[red]clinic", "[link=https://example.org]clinic[/link]", "[/]", "<script>alert(1)</script>", "<img src=x>")
"""Visible, so allowed in a name; every place that shows one must leave it what it is."""


@pytest.mark.parametrize("hostile", UNSEEN.values(), ids=UNSEEN)
def test_what_nobody_sees_is_refused_in_names_lines_and_tokens_and_escaped_where_it_is_shown(hostile):
    for check in (text.name, text.line, text.token):
        with pytest.raises(InvalidInput, match="visible") as caught:
            check("client", hostile)
        assert text.is_visible(str(caught.value))  # the refusal's own words can be shown
    assert not text.is_visible(hostile)
    assert text.is_visible(text.shown(hostile))
    assert "clinic" in text.shown(hostile)


@pytest.mark.parametrize("odd", ["", " a", "a ", "=1+1", "+1", "-1", "@SUM(A1)", "x" * 257, 7, None, ["a"]])
def test_a_name_is_a_text_of_some_length_without_blanks_around_it_and_no_formula(odd):
    with pytest.raises(InvalidInput, match="client"):
        text.name("client", odd)


@pytest.mark.parametrize("good", ["clinic-a", "Klinik für Äugen", "東京大学", "مستشفى", "a b", "x" * 256, "η", *MARKUP])
def test_names_of_every_script_are_names(good):
    assert text.name("client", good) == good
    assert text.shown(good) == good


def test_what_is_too_long_is_refused_or_cut():
    with pytest.raises(InvalidInput, match="at most 4000"):
        text.line("note", "x" * 4001)
    assert text.shown("x" * 600) == "x" * 500 + " … (600 characters)"
    assert len(text.shown("\U000e0041" * 10_000)) < 6_000


@given(st.text(st.characters(codec=None, categories=None), max_size=60))
def test_whatever_is_shown_is_one_visible_line(anything):
    shown = text.shown(anything)
    assert text.is_visible(shown)
    assert not {unicodedata.category(one) for one in shown} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    shown.encode()
    if text.is_visible(anything):
        assert shown == anything
    assert text.shown(anything, keep="\n").count("\n") == anything.count("\n")


def plan(**changes):
    values = {
        "run_id": "run-1", "server_round": 1, "client": "clinic-a", "dataset": "notes", "attempt": 1,
        "participation": 0, "event": EVENT, "local_steps": 1, "clipping_norm": 1.0, "expected_batch_size": 10.0,
        "declared_records": 1000, "optimizer": "adam", "learning_rate": 0.1, "aggregation": "ffa",
        "backbone_hash": "b" * 64, "adapter_hash": "a" * 64, "envelope": Envelope((EVENT,)),
    }  # fmt: skip
    return Plan(**{**values, **changes})


def described(**changes):
    values = {
        "client": "clinic-a", "dataset": "notes", "public_key": KEY.public_key, "declared_records": 1000,
        "backbone_hash": "b" * 64, "shapes": {"a": (1,)}, "trained": ("a",), "initial_hash": "c" * 64,
    }  # fmt: skip
    return Description(**{**values, **changes}).to_json()


def charged(**changes):
    run = ChargedRun("run-1", "notes", None, "add_remove", 1e-5, 1.0, Envelope((EVENT,)))
    return {**vars(run), "envelope": run.envelope.to_json(), **changes}


def begun(participation=0, **changes):
    reservation = Reservation("r1", "run-1", 1, "clinic-a", "notes", 1, EVENT)
    return {"reservation": {**reservation.to_json(), **changes}, "participation": participation}


def history(**changes):
    body = ClientHistory("clinic-a", KEY.public_key, (), (), "0" * 64, "c").to_json()
    return {**body, "charged": [charged()], "begun": [begun()], **changes}


def part_request():
    return PartRequest.sign(KEY, "run-1", "clinic-a", "notes", Envelope(())).to_json()


MESSAGES = {
    "description: client": lambda odd: Description.from_json({**described(), "client": odd}),
    "description: data set": lambda odd: Description.from_json({**described(), "dataset": odd}),
    "description: version": lambda odd: Description.from_json({**described(), "version": odd}),
    "description: tensor": lambda odd: Description.from_json({**described(), "shapes": {odd: [1]}}),
    "description: recipe": lambda odd: Description.from_json({**described(), "recipe": {"task": odd}}),
    "plan: run": lambda odd: Plan.from_json({**plan().to_json(), "run_id": odd}),
    "plan: client": lambda odd: Plan.from_json({**plan().to_json(), "client": odd}),
    "plan: optimizer": lambda odd: Plan.from_json({**plan().to_json(), "optimizer": odd}),
    "reply": lambda odd: Reply({"a": np.zeros(1, np.float32)}, odd, "0" * 64),
    "reply: head": lambda odd: Reply({"a": np.zeros(1, np.float32)}, "r1", odd),
    "refusal": lambda odd: Refusal.from_json(
        Refusal("r1", "c" * 64, RefusalReason.POLICY, True, "s").to_json() | {"reservation_id": odd}
    ),
    "list request": lambda odd: ListRequest.from_json(vars(ListRequest.sign(KEY, "clinic-a")) | {"client": odd}),
    "part request: run": lambda odd: PartRequest.from_json(part_request() | {"run_id": odd}),
    "part request: data set": lambda odd: PartRequest.from_json(part_request() | {"dataset": odd}),
    "part request: signature": lambda odd: PartRequest.from_json(part_request() | {"signature": odd}),
    "list: client": lambda odd: ClientHistory.from_json(history(client=odd)),
    "list: run": lambda odd: ClientHistory.from_json(history(charged=[charged(run_id=odd)])),
    "list: group": lambda odd: ClientHistory.from_json(history(charged=[charged(group=odd)])),
    "list: reservation": lambda odd: ClientHistory.from_json(history(begun=[begun(reservation_id=odd)])),
    "list: head": lambda odd: ClientHistory.from_json(history(head=odd)),
    "attested": lambda odd: Attested.from_json(
        {"reservation_id": odd, "server_round": 1, "participation": 0, "event": None}
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_no_message_of_a_peer_brings_such_a_text_in(kind):
    make = MESSAGES[kind]
    make("clinic-a")
    for hostile in (*UNSEEN.values(), "x" * 5000):
        with pytest.raises(InvalidInput):
            make(hostile)
    for odd in (7, None, ["clinic-a"], {"a": 1}):
        if kind not in ("description: tensor", "description: recipe", "list: group"):  # keys, and what may be missing
            with pytest.raises((ValueError, TypeError)):
                make(odd)


@pytest.mark.parametrize(
    "changes",
    [
        {"declared_records": "1000"}, {"declared_records": 0}, {"declared_records": True}, {"declared_records": 1e3},
        {"shapes": {"a": ["1"]}}, {"shapes": {"a": [-1]}}, {"shapes": {"a": [0]}}, {"shapes": {"a": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_no_run_could_be_drawn_up_with_is_none(changes):
    """Such a node is as good as absent; it does not end the run of those who wait for it."""
    with pytest.raises((ValueError, TypeError)):
        Description.from_json({**described(), **changes})


@pytest.mark.parametrize(
    "odd",
    [
        history(charged=[charged(epsilon="1")]),
        history(charged=[charged(epsilon=-1.0)]),
        history(charged=[charged(epsilon=True)]),
        history(charged=[charged(delta="1e-5")]),
        history(charged=[charged(delta=0.0)]),
        history(charged=[charged(delta=2.0)]),
        history(charged=[charged(relation="none")]),
        history(charged=[charged(envelope="all")]),
        history(charged=[charged(more=1)]),
        history(begun=[begun(participation="0")]),
        history(begun=[begun(participation=-1)]),
        history(begun=[begun(participation=True)]),
        history(begun=[begun(participation=2**40)]),
        history(begun=[begun(server_round="1")]),
        history(begun=[begun(server_round=0)]),
        history(begun=[begun(attempt=None)]),
        history(begun=7),
        history(charged=None),
    ],
)
def test_a_signed_list_holds_nothing_that_the_ledger_could_not_be_read_with(odd):
    """It is imported into a book where nothing can be mended: a wrong type would stop the coordinator for ever."""
    ClientHistory.from_json(history())
    with pytest.raises(InvalidInput):
        ClientHistory.from_json(odd)
    assert Begun.from_json(begun()).participation == 0


@pytest.mark.parametrize("hostile", [*UNSEEN.values(), *MARKUP], ids=[*UNSEEN, *MARKUP])
def test_a_line_of_a_log_is_one_line_in_both_forms(hostile, monkeypatch):
    """Newline injection would let a peer write lines in another's name."""
    root = logging.getLogger()
    for form in logs.FORMS:
        stream, before = io.StringIO(), list(root.handlers)
        try:
            root.handlers.clear()  # pytest's own would carry a lone surrogate to another process, which it cannot
            logs.configure(form, stream=stream)
            logging.getLogger("server").warning("%s left", hostile, extra={"client": hostile, "clients": [hostile]})
            try:
                raise ValueError(hostile)
            except ValueError:
                logging.getLogger("server").exception("it failed")
        finally:
            root.handlers[:] = before
        first, second, *rest = stream.getvalue().split("\n")
        assert all(text.is_visible(one) for one in (first, second, *rest))
        assert "left" in first
        assert "it failed" in second
    for name in logs.ROOMS:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.parametrize("hostile", [*UNSEEN.values(), *MARKUP], ids=[*UNSEEN, *MARKUP])
def test_a_runs_log_has_one_line_for_each_sentence_and_the_commands_show_it_inert(hostile, tmp_path):
    home = make_home(tmp_path)
    folder = RunFolder(home / "runs" / ("ab" * 8), home)
    folder.path.mkdir()
    (folder.path / "run.toml").write_text("rounds = 1\n")
    folder.say(f"{hostile}: no usable part")
    folder.note("failed", error=hostile, exit_code=5)
    lines = (folder.path / "run.log").read_text("utf-8").split("\n")
    assert len(lines) == 2
    assert text.is_visible(lines[0])
    (folder.path / "run.log").write_text(f"2030-01-01T00:00:00Z {hostile.encode(errors='replace').decode()}\n", "utf-8")
    for command in (["logs"], ["show"]):
        done = CliRunner().invoke(app, ["coordinator", "runs", *command, folder.run_id, "--folder", str(home)])
        assert done.exit_code == 0, done.output
        assert all(text.is_visible(one) for one in done.output.split("\n"))


@pytest.mark.parametrize("hostile", [*UNSEEN.values(), *MARKUP], ids=[*UNSEEN, *MARKUP])
def test_markup_in_a_name_is_no_markup_on_a_terminal(hostile):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=400)
    Terminal(console).say(f"{hostile} has answered")
    written = stream.getvalue()
    assert "\x1b" not in written
    assert text.shown(hostile) in written


@pytest.mark.parametrize("hostile", ["\x1b[2Jx", "\u202ex", "[red]x[/red]", "[link=https://e.org]x[/link]", "x\\"])
def test_a_ledger_with_anything_in_it_is_shown_exported_and_read_again(hostile, tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        word = hostile.replace("\x1b", "")  # a ledger's own words have none; what was recorded may
        ledger.append(word, word, {"client": hostile, "formula": "=1+1"}, idempotency_key=word)
        rows = list(ledger.rows())
    done = CliRunner().invoke(app, ["ledger", "show", str(path)], env={"COLUMNS": "500", "FORCE_COLOR": "1"})
    assert done.exit_code == 0, done.output
    assert "\u202e" not in done.output
    assert "\x1b[2J" not in done.output
    assert "\x1b]8;" not in done.output  # no link
    if hostile.startswith("["):
        assert hostile in done.output
    for form in ("csv", "json"):
        data = b"".join(export_lines(rows, form))
        assert [tuple(row) for row in read_export(data)] == [tuple(row) for row in rows]
        assert data.count(b"\n") == 1 + (form == "csv")  # no line that a reader of lines would count beside
    table = list(csv.reader(io.StringIO(b"".join(export_lines(rows, "csv")).decode())))
    assert len(table) == 2
    assert len(table[0]) == len(table[1])


@pytest.mark.parametrize("hostile", [*UNSEEN.values(), *MARKUP], ids=[*UNSEEN, *MARKUP])
def test_a_page_shows_a_name_and_nothing_else_of_it(hostile):
    page = environment("server.dashboard").from_string("<td title='{{ name }}'>{{ name }}</td>").render(name=hostile)
    assert all(text.is_visible(one) for one in page.split("\n"))
    assert page.count("<") == 2
    page.encode()


def test_a_childs_line_keeps_its_colours_and_nothing_else():
    for hostile in UNSEEN.values():
        line = f"\x1b[92mINFO \x1b[0m:      {hostile} said so\n"
        seen = coloured(line.replace("\x1b[1;31m", ""))
        assert seen.startswith("\x1b[92mINFO \x1b[0m:")
        assert seen.endswith(" said so\n")
        rest = seen.removeprefix("\x1b[92mINFO \x1b[0m")
        assert all(text.is_visible(one) for one in rest.split("\n"))


def test_what_a_template_marks_as_markup_and_what_is_no_text_stay_what_they_are():
    template = environment("server.dashboard").from_string("{{ 3 }}{{ 1.5 }}{{ moment | when }}{{ 'a\tb\nc' }}")
    assert template.render(moment=0.0).endswith("UTC</time>a\tb\nc")


@pytest.mark.parametrize("hostile", [*UNSEEN.values(), *MARKUP, 'x"} 1\ncloister_up 0'])
def test_a_label_of_a_metric_ends_where_it_should(hostile):
    registry = CollectorRegistry(auto_describe=False)

    class One:
        def collect(self):
            family = GaugeMetricFamily("cloister_epsilon_spent", "spent", labels=["client"])
            family.add_metric([hostile.encode(errors="replace").decode()], 1.0)
            yield family

    registry.register(One())
    lines = generate_latest(registry).decode().split("\n")
    assert [line for line in lines if line and not line.startswith("#")] == [lines[2]]
    assert lines[2].endswith(" 1.0")


def test_a_model_card_has_no_tag_and_no_link_of_somebody_elses():
    for hostile in MARKUP:
        inert = _inert(f"- {hostile}: ε ≤ 1")
        assert "<" not in inert
        assert "[" not in inert.replace("\\[", "")


def test_an_error_is_told_without_the_sequences_of_whoever_caused_it(tmp_path):
    done = CliRunner().invoke(app, ["certificate", "verify", str(tmp_path / "\x1b[2J\u202ex")])
    assert "\x1b[2J" not in done.output
    assert "\u202e" not in done.output


def test_a_certificate_with_such_a_text_anywhere_does_not_verify():
    body = {"run_id": "run-1", "notes": ["all is well \x1b[8m"]}
    outer = {"format": "cloister certificate", "version": 1, "certificate": body}
    data = canonical({**outer, "signature": KEY.sign("certificate", body)})
    with pytest.raises(LedgerCorrupt, match="visible"):
        verify_certificate(data)


def test_the_plan_that_is_not_hostile_is_one():
    assert Plan.from_json(plan().to_json()) == plan()
    assert replace(plan(), client="東京").client == "東京"


def test_an_organisations_own_policy_is_held_to_the_rule_that_its_peers_hold_it_to():
    values = {
        "organisation": "clinic-a", "datasets": {"notes": {"declared_records": 1000, "target_epsilon": 8.0}},
        "min_noise_multiplier": 0.1, "max_sample_rate": 0.5, "max_steps_per_round": 1, "backbones": ("b" * 64,),
        "coordinator_keys": (KEY.public_key,), "accountant_keys": (KEY.public_key,),
    }  # fmt: skip
    assert Policy(**values).organisation == "clinic-a"
    for hostile in (*UNSEEN.values(), "", " a", "=1+1"):
        named = {hostile: values["datasets"]["notes"]}
        grouped = {"notes": {**values["datasets"]["notes"], "group": hostile}}
        for changes in ({"organisation": hostile}, {"datasets": named}, {"datasets": grouped}):
            with pytest.raises(ValidationError, match="name"):
                Policy(**{**values, **changes})
