"""``cloister simulate``: the whole federation on one machine, with the code of the real one.

Order matters for privacy: settings, model and self-test come before data is opened; everything that can be wrong with
the data is found before round 1; and a folder for the results appears only after that.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from client.data.tokens import Prepared
from client.engine import FrozenStates
from client.engine.subspace import refuse_private_rows
from client.evaluator import Evaluator
from client.relay import build_relay
from client.trainer import StepListener, Trainer
from common.certificate import Certificate, statement
from common.combinations import check_combination
from common.config import RunConfig
from common.errors import CloisterError, InvalidInput, Unavailable
from common.messages import Arrays
from deploy.inputs import Inputs, classes_of, declared_records, gather, next_output, tokenise, tokenise_silos
from deploy.reporting.folders import recover_folder
from deploy.reporting.report import write_report
from deploy.reporting.run_record import read_run
from deploy.reporting.statements import Run, write_adapter, write_metrics
from deploy.simulation.clients import (
    FolderClients,
    InProcessClients,
    StateFolder,
    build_trainer,
    describe,
    open_guard,
    write_for_actors,
)
from deploy.simulation.inprocess_grid import InProcessGrid
from deploy.simulation.same_data import check_same_data
from deploy.workshop import Workshop, open_workshop, set_threads
from server.accountants import Accountant, open_accountant
from server.app import build_server_app
from server.checkpoint import write_atomically
from server.exchange import Exchange
from server.rounds import Finished, Listener, RoundLoop
from server.terms import RunTerms, draw_up
from server.trackers import Lines, tracking

CONNECT_TIMEOUT_S = 120.0
NOT_COMPARED = frozenset(
    {"resume", "output", "threads", "backend", "micro_batch_size", "device", "cache_frozen_layers"}
    | {"accountant_certificate", "accountant_key", "accountant_authority", "tensorboard", "mlflow"}
)
"""Settings that may differ when a run is resumed: they change speed or how the accountant is reached, nothing else."""


DEMO_PRESET: Mapping[str, Any] = {
    "rounds": 24,
    "expected_batch_size": 64.0,
    "server_learning_rate": 0.08,
    "max_length": 96,
}


class Watcher(Listener):
    """Hears everything a simulation does; the terminal is one."""

    def prepared(self, terms: RunTerms, prepared: Mapping[str, Prepared], inputs: Inputs, output: Path) -> None:
        """All is ready; round 1 comes next. The counts in ``prepared`` are private: they are for each organisation."""

    def warn(self, text: str) -> None:
        """Something the people who run this should know."""

    def stepped(self, client: str, step: int, steps: int) -> None:
        """A client has done one of its local steps."""


@dataclass(frozen=True)
class Result:
    """Where everything is, and what came out."""

    output: Path
    terms: RunTerms
    metrics: tuple[dict[str, Any], ...]
    certificate: Certificate
    statement: str = field(repr=False)


def simulate(config: RunConfig, watcher: Watcher | None = None, *, states: FrozenStates | None = None) -> Result:
    """Run a simulation to its end and write everything it leaves.

    ``states`` may be shared by several runs of one process that cache frozen layers (``client/engine/frozen.py``).

    Raises:
        InvalidInput: a setting or the data is not usable; no output folder was made.
        CloisterError: see ``common/errors.py``; what was finished is in the output folder and can be resumed.
    """
    watcher = watcher or Watcher()
    set_environment()
    set_threads(config.threads)
    config, run_id, output = _settle(config)
    check_combination(config)
    if config.task == "classification":  # the classes' names are needed to build the head
        inputs = gather(config)
        classes = classes_of(config, inputs)
        workshop = open_workshop(config, classes, states=states)
    else:
        workshop = open_workshop(config, (), states=states)
        inputs, classes = gather(config), ()
    prepared = tokenise_silos(config, inputs.silos, workshop.tokenizer, workshop.max_length, classes)
    # All silos at once: in a copy of the whole data no silo's own records need be the most.
    refuse_private_rows(workshop.workbench.public_rows, [row for one in prepared.values() for row in one.examples])
    evaluator = _evaluator(config, inputs, workshop, classes)
    fresh = not output.exists()
    with ExitStack() as stack:
        if fresh:
            missing = [folder for folder in output.parents if not folder.exists()]
            stack.callback(lambda: _remove_if_unstarted(output, missing))
        state = _make_folders(output)
        recover_folder(output / "adapter")
        check_same_data(state.path / "data.json", prepared, resumed=config.resume)
        terms = _terms(config, run_id, prepared, inputs, workshop, state)
        _write_settings(state, config, run_id)
        watcher.prepared(terms, prepared, inputs, output)
        for text in _warnings(terms, inputs, evaluator is not None):
            watcher.warn(text)
        return _Session(config, terms, inputs, classes, workshop, prepared, state, output, evaluator, watcher).run()


@dataclass(frozen=True)
class _Session:
    """One simulation with all its parties."""

    config: RunConfig
    terms: RunTerms
    inputs: Inputs
    classes: tuple[str, ...]
    workshop: Workshop
    prepared: Mapping[str, Prepared]
    state: StateFolder
    output: Path
    evaluator: Evaluator | None
    watcher: Watcher

    def run(self) -> Result:
        with open_accountant(
            self.config,
            ledger=self.output / "ledger.sqlite",
            key=self.state.key_file("accountant"),
            seen=self.state.accountant_file,
        ) as accountant:
            write = partial(write_metrics, self.output / "metrics.jsonl")
            with tracking(self.config, self.terms, self.output, write) as keep:
                finished = self._train(accountant, keep)
            return self._write(accountant, finished)

    def _train(self, accountant: Accountant, keep: Callable[[Lines], None]) -> Finished:
        done: list[Finished] = []

        def serve(grid: Grid, _context: Context) -> None:
            done.append(self._loop(Exchange(grid), accountant, keep).run())

        app = build_server_app(serve)
        if self.config.backend == "ray":
            self._on_ray(app)
        else:
            self._in_process(app)
        return done[0]

    def _loop(self, exchange: Exchange, accountant: Accountant, keep: Callable[[Lines], None]) -> RoundLoop:
        descriptions = exchange.describe(len(self.terms.clients), CONNECT_TIMEOUT_S)
        if [one.client for one in descriptions] != [client.name for client in self.terms.clients]:
            raise Unavailable("the nodes that answered are not the silos of this run")
        return RoundLoop(
            terms=self.terms,
            initial=self.workshop.workbench.initial,
            public_keys={one.client: one.public_key for one in descriptions},
            exchange=exchange,
            accountant=accountant,
            key=self.state.key("coordinator"),
            folder=self.state.path,
            evaluate=self.evaluator,
            evaluate_every=self.config.eval_every,
            on_metrics=keep,
            listener=self.watcher,
        )

    def _in_process(self, app: Any) -> None:
        with ExitStack() as stack:
            trainers = dict(self._trainers(stack, self.watcher.stepped))
            grid = InProcessGrid(build_relay(InProcessClients(trainers)), list(trainers))
            app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}))

    def _trainers(self, stack: ExitStack, listener: StepListener) -> Iterator[tuple[str, Trainer]]:
        for index, client in enumerate(self.terms.clients):
            guard = open_guard(client, index, self.terms, self.state)
            stack.callback(guard.close)
            examples = self.prepared[client.name].examples
            yield (
                client.name,
                build_trainer(client, examples, guard, self.workshop.workbench, self.config.seed, listener),
            )

    def _on_ray(self, app: Any) -> None:
        from deploy.simulation.ray_backend import run_on_ray

        with tempfile.TemporaryDirectory(prefix="cloister-actors-") as folder:
            examples = {name: one.examples for name, one in self.prepared.items()}
            write_for_actors(Path(folder), self.config, self.classes, self.terms, self.state, examples)
            run_on_ray(app, build_relay(FolderClients(Path(folder))), len(self.terms.clients), self.config)

    def _write(self, accountant: Accountant, finished: Finished) -> Result:
        run = Run(
            config=self.config,
            terms=self.terms,
            classes=self.classes,
            held_out=self.inputs.held_out,
            max_length=self.workshop.max_length,
            accountant=accountant,
            coordinator=self.state.key("coordinator"),
            client_keys={client.name: self.state.client_key(i) for i, client in enumerate(self.terms.clients)},
        )
        with ExitStack() as stack:
            guards = {}
            for index, client in enumerate(self.terms.clients):
                guards[client.name] = open_guard(client, index, self.terms, self.state)
                stack.callback(guards[client.name].close)
            data = run.certificate(guards, finished.adapter, int(finished.metrics[-1]["round"]))
        write_atomically(self.output / "certificate.json", data)
        certificate = Certificate.from_json(json.loads(data)["certificate"])
        write_adapter(self.output / "adapter", self.workshop, finished.adapter, run, certificate, finished.metrics)
        write_report(read_run(self.output), self.output / "report.html")
        return Result(self.output, self.terms, finished.metrics, certificate, statement(certificate))


def set_environment() -> None:
    """Keep Flower, Ray and the hub library quiet and off the network, whatever the user's shell says about them."""
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def with_demo_preset(config: RunConfig) -> RunConfig:
    """The settings found for the embedded demo, where nothing else was asked for; they suit no other model."""
    if (config.data, config.model) != ("demo", "demo"):
        return config
    asked = config.model_fields_set
    return config.model_copy(update={name: value for name, value in DEMO_PRESET.items() if name not in asked})


def _settle(config: RunConfig) -> tuple[RunConfig, str, Path]:
    """The settings, run id and folder to use: new ones, or those of the run that is resumed."""
    if not config.resume:
        output = Path(config.output) if config.output else next_output()
        _check_free(output)
        return with_demo_preset(config), secrets.token_hex(8), output
    if config.output is None:
        raise InvalidInput("--resume needs --output: the folder of the run that is to go on")
    output = Path(config.output)
    file = output / "state" / "run.json"
    try:
        body = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file}: cannot be read, so there is no run to resume ({error})") from error
    stored = RunConfig.from_mapping(body["config"])
    given = {name: getattr(config, name) for name in config.model_fields_set}
    for name, value in given.items():
        if name not in NOT_COMPARED and value != getattr(stored, name):
            raise InvalidInput(
                f"{name.replace('_', '-')} = {value!r}, but the run was started with {getattr(stored, name)!r}: "
                "leave it out to resume"
            )
    kept = {name: value for name, value in given.items() if name in NOT_COMPARED}
    return stored.model_copy(update=kept), body["run_id"], output


def _check_free(output: Path) -> None:
    """Refuse a folder that holds anything but what a run leaves that was killed before its first line."""
    if not output.exists():
        return
    if not output.is_dir():
        raise InvalidInput(f"{output}: is a file; choose a folder that does not exist yet for --output")
    if {entry.name for entry in output.iterdir()} - {"state"} or (output / "state" / "run.json").exists():
        raise InvalidInput(f"{output}: is not empty; choose another --output, or go on with --resume")


def _make_folders(output: Path) -> StateFolder:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "state").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{output}: cannot be made ({error.strerror}); choose another --output") from error
    return StateFolder(output / "state")


def _write_settings(state: StateFolder, config: RunConfig, run_id: str) -> None:
    body = {"run_id": run_id, "config": config.model_dump(mode="json", by_alias=True, exclude_unset=True)}
    write_atomically(state.path / "run.json", json.dumps(body, indent=2).encode())


def _terms(
    config: RunConfig, run_id: str, prepared: Mapping[str, Prepared], inputs: Inputs, workshop: Workshop,
    state: StateFolder,
) -> RunTerms:  # fmt: skip
    descriptions = [
        describe(name, index, declared_records(config, name, prepared[name].examples), state, workshop.workbench)
        for index, name in enumerate(sorted(prepared))
    ]
    # Sizes that follow from the data are published, so removing a record must leave them as they are.
    relation = "zero_out" if config.relation == "add_remove" and not inputs.declared else config.relation
    return draw_up(config, descriptions, run_id, relation=relation)


def _evaluator(
    config: RunConfig, inputs: Inputs, workshop: Workshop, classes: Sequence[str]
) -> Callable[[Arrays], Any] | None:
    if not inputs.evaluation:
        return None
    examples = tokenise(config, inputs.evaluation, workshop.tokenizer, workshop.max_length, classes).examples
    if not examples:
        raise InvalidInput(
            f"the evaluation set keeps no completion token within {workshop.max_length} tokens: raise --max-length"
        )
    pad = workshop.tokenizer.pad_token_id
    return Evaluator(workshop.model, examples, pad_token_id=pad, hold=workshop.workbench.hold)


def _warnings(terms: RunTerms, inputs: Inputs, evaluated: bool) -> Iterator[str]:
    if not evaluated:
        yield "no public evaluation set: the score is empty; give --eval-data or --holdout"
    noise = {client.name: client.noise_on_the_mean for client in terms.clients if client.envelope is not None}
    if not noise:
        return
    median = sorted(noise.values())[len(noise) // 2]
    for client in terms.clients:
        if noise.get(client.name, 0.0) > 2 * median:
            yield (
                f"{client.name} ({client.declared_records} declared records): its noise per step is "
                f"{noise[client.name] / median:.1f} times the median silo's, and with equal weights it is "
                f"{_share(noise, client.name):.0%} of the noise in the average. What helps: --weights declared, a "
                "larger ε for it, fewer rounds, or --only-silos without it"
            )


def _share(noise: Mapping[str, float], name: str) -> float:
    """One silo's part of the variance of the noise in an equally weighted average."""
    return noise[name] ** 2 / sum(value**2 for value in noise.values())


def _remove_if_unstarted(output: Path, made: Sequence[Path] = ()) -> None:
    """Leave nothing behind if not even round 0 was written, nor the empty folders ``made`` above it."""
    if (output / "metrics.jsonl").exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Deprecations of libraries are for the tests, not for the terminal of a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


__all__ = ["CloisterError", "Result", "Watcher", "quiet_warnings", "set_environment", "simulate"]
