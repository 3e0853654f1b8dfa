"""What a person sees on a terminal: bars, warnings and tables that take every name literally."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from client.data.tokens import Prepared
from common.config import RunConfig
from common.messages import Description
from deploy.inputs import Inputs, next_output
from deploy.simulation.terminal import Terminal, closing
from server.accountant import Denial, Outcome
from server.terms import draw_up

NAMES = ("[/red]", "[bold]clinic")


def description(name):
    return Description(name, name, "key", 1000, "b", {"x": (2,)}, ("x",), "i")


def record(number, score=0.5, epsilon=1.0):
    return {
        "round": number, "score": score, "loss": None if score is None else 1.5,
        "epsilon": None if epsilon is None else dict.fromkeys(NAMES, epsilon), "seconds": 0.1,
    }  # fmt: skip


@pytest.fixture(params=[True, False], ids=["terminal", "plain"])
def console(request):
    return Console(file=io.StringIO(), force_terminal=request.param, width=200)


@pytest.mark.parametrize("private", [True, False])
def test_everything_that_happens_is_shown_and_no_name_is_markup(console, tmp_path, private):
    settings = {"rounds": 2, "expected-batch-size": 10, "no-privacy": not private}
    terms = draw_up(RunConfig.from_mapping(settings), [description(name) for name in NAMES], "run")
    epsilon = 1.0 if private else None
    with Terminal(console) as terminal:
        terminal.say("loading [this]")
        terminal.prepared(terms, {NAMES[0]: Prepared((1, 2, 3), 2, 1)}, Inputs({}, [], 7, False), tmp_path / "[run]")
        terminal.round_ended(record(0, epsilon=epsilon))
        terminal.round_started(1, NAMES)
        terminal.stepped(NAMES[0], 1, 4)
        terminal.answered(1, NAMES[0], Outcome.REPLIED, "")
        terminal.answered(1, NAMES[1], Outcome.ERROR, "code 2: [/yellow] whatever a client says")
        terminal.denied(1, Denial(NAMES[1], 1.0, 2.0, 0.5))
        terminal.round_ended(record(1, score=None, epsilon=epsilon))
        terminal.warn("a warning about [/x]")
    certificate = SimpleNamespace(private=private, reasons=("the run was made with --no-privacy",))
    result = SimpleNamespace(
        terms=terms, metrics=[record(0, epsilon=epsilon), record(1, score=None, epsilon=epsilon)],
        output=tmp_path / "[run]", certificate=certificate,
    )  # fmt: skip
    closing(result, console)
    shown = console.file.getvalue()
    for words in (
        "loading [this]", "[/red]: 2 of 3 records", "[/red]: 1 records keep no completion token",
        "7 records are set aside",
        "[/yellow] whatever a client says", "[bold]clinic leaves", "a warning about [/x]", "certificate verify",
    ):  # fmt: skip
        assert words in shown.replace("\n", " ")
    assert ("not private" in shown) == (not private)
    assert ("upper bound (PLD)" in shown) == private


def test_the_command_at_the_end_stays_on_one_line(tmp_path):
    console = Console(file=io.StringIO(), width=40)
    terms = draw_up(RunConfig.from_mapping({"rounds": 1, "expected-batch-size": 10}), [description("a")], "run")
    line = record(1) | {"epsilon": {"a": 1.0}}
    certificate = SimpleNamespace(private=True, reasons=())
    closing(SimpleNamespace(terms=terms, metrics=[line], output=tmp_path, certificate=certificate), console)
    assert f"certificate verify {tmp_path}/certificate.json\n" in console.file.getvalue()


def test_results_go_to_the_first_unused_folder(tmp_path):
    assert next_output(tmp_path / "runs") == tmp_path / "runs" / "001"
    (tmp_path / "runs" / "001").mkdir(parents=True)
    assert next_output(tmp_path / "runs") == tmp_path / "runs" / "002"
