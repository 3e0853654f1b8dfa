"""``cloister client policy init|check`` and ``cloister client budget``: an organisation looks after its own rules.

Nothing here leaves the machine. ``check`` reads the records, to say before round 1 what could go wrong with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from client.admission import DatasetSpent
from client.journal import Journal
from client.policy import Policy, default_delta
from common.errors import InvalidInput
from common.ledger import Ledger
from common.signing import fingerprint

policy_app = typer.Typer(name="policy", help="Write and check what this organisation allows.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
PolicyFile = Annotated[Path, typer.Argument(metavar="POLICY", help="TOML file")]

TEMPLATE = """\
# What {organisation} allows with its records. Read by its trainer only; unknown keys are refused.
organisation = {organisation_text}
min-noise-multiplier = 0.5
max-sample-rate = 0.2
max-steps-per-round = 16
backbones = {backbones}                # SHA-256 of each backbone that may be trained
coordinator-keys = {coordinator_keys}
accountant-keys = {accountant_keys}
# expires = 2030-01-01
release = "immediate"         # replies leave when they are ready: timing is not protected
# anchor = "/mnt/elsewhere/head"   # a file outside this machine; shows a ledger that was set back

[datasets.{dataset}]
declared-records = {declared_records}       # a public constant, never recomputed from the data
target-epsilon = {target_epsilon}         # for the data set's lifetime: all runs, all coordinators
target-delta = {target_delta}
# group = "patients"          # data sets that may share a record share one budget
# run-epsilon = 1.0           # the most that one run may take; several runs need run-delta too

# [allowed-methods]           # without it every method that is known here is allowed; each costs its event
# clipping = ["fixed", "automatic"]
# noise-allocation = ["uniform"]
# aggregation = ["ffa"]
# reparametrization = ["lora"]
"""


def render_policy(
    *,
    organisation: str,
    dataset: str,
    declared_records: int,
    target_epsilon: float,
    coordinator_keys: list[str],
    accountant_keys: list[str],
    backbones: Sequence[str] = (),
) -> str:
    """A policy file for one data set, with a word on every setting."""
    return TEMPLATE.format(
        organisation=organisation.replace("\n", " "),
        organisation_text=json.dumps(organisation),
        dataset=json.dumps(dataset),
        declared_records=declared_records,
        target_epsilon=target_epsilon,
        target_delta=default_delta(declared_records),
        coordinator_keys=json.dumps(coordinator_keys),
        accountant_keys=json.dumps(accountant_keys),
        backbones=json.dumps(list(backbones)),
    )


def check_policy_file(path: Path, *, records: dict[str, int] | None = None) -> dict[str, Any]:
    """What the policy allows, and what its owner should know.

    Args:
        path: the TOML file.
        records: data set to the number of its records, counted here and shown here only.

    Raises:
        InvalidInput: the file is unsound, or names no data set that was counted.
    """
    policy = Policy.load(path)
    warnings = []
    for name, count in (records or {}).items():
        if name not in policy.datasets:
            raise InvalidInput(f"{path}: there is no data set {name!r}; known: {', '.join(policy.datasets)}")
        declared = policy.datasets[name].declared_records
        if not 0.5 <= count / declared <= 2:
            warnings.append(
                f"{name}: {count} records, declared {declared}: privacy holds, but steps are sized for another set"
            )
    if not policy.is_anchored:
        warnings.append("no anchor: a ledger that is set back to an older state will not be noticed")
    warnings.append("release is immediate: when replies leave may depend on the records")
    if not policy.backbones:
        warnings.append("no backbone is allowed: every request will be refused")
    return {
        "organisation": policy.organisation,
        "coordinators": [fingerprint(key) for key in policy.coordinator_keys],
        "accountants": [fingerprint(key) for key in policy.accountant_keys],
        "datasets": {
            name: {
                "declared_records": item.declared_records,
                "target_epsilon": item.target_epsilon,
                "target_delta": item.target_delta,
                "epsilon_per_run": item.epsilon_per_run,
                "delta_per_run": item.delta_per_run,
                "relation": item.relation,
                "group": item.group,
            }
            for name, item in policy.datasets.items()
        },
        "warnings": warnings,
    }


def budgets(policy_path: Path, ledger_path: Path) -> dict[str, DatasetSpent]:
    """What each data set has spent, read from the organisation's own ledger while the trainer may be running.

    Raises:
        Unavailable: there is no ledger. LedgerCorrupt: it does not verify.
    """
    policy = Policy.load(policy_path)
    with Ledger(ledger_path, read_only=True) as ledger:
        journal = Journal(ledger)
        journal.catch_up()
    found = {}
    for name, item in policy.datasets.items():
        epsilon, delta = journal.spent(name, item.group)
        found[name] = DatasetSpent(epsilon, delta, item.target_epsilon, item.target_delta)
    return found


@policy_app.command("init")
def _init(
    path: PolicyFile,
    organisation: Annotated[str, typer.Option("--organisation", help="its name, as the coordinator calls it")],
    dataset: Annotated[str, typer.Option("--dataset", help="name of the records that share one budget")],
    declared_records: Annotated[int, typer.Option("--declared-records", min=1, help="a public, rounded number")],
    coordinator_key: Annotated[list[str], typer.Option("--coordinator-key", help="pinned public key")],
    accountant_key: Annotated[list[str], typer.Option("--accountant-key", help="pinned public key")],
    target_epsilon: Annotated[float, typer.Option("--target-epsilon", help="for the data set's lifetime")] = 3.0,
    backbone: Annotated[
        list[str] | None, typer.Option("--backbone", help="hash of one that may be trained; may be repeated")
    ] = None,
) -> None:
    """Write a policy to start from; the file must not exist."""
    text = render_policy(
        organisation=organisation,
        dataset=dataset,
        declared_records=declared_records,
        target_epsilon=target_epsilon,
        coordinator_keys=coordinator_key,
        accountant_keys=accountant_key,
        backbones=backbone or (),
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InvalidInput(f"{path}: the policy cannot be written ({error.strerror})") from error
    try:
        Policy.load(path)
    except InvalidInput:
        path.unlink()
        raise
    first = "" if backbone else "add the backbones that may be trained, then "
    typer.echo(f"{path}: written; {first}run 'cloister client policy check {path}'")


@policy_app.command("check")
def _check(
    path: PolicyFile,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="DATASET=PATH", help="read these records; may be repeated")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a policy, and the records of its data sets (they stay here, and so do their numbers)."""
    found = check_policy_file(path, records=dict(_count(item) for item in data or []))
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    for name, item in found["datasets"].items():
        typer.echo(
            f"{name}: ε ≤ {item['target_epsilon']:g} at δ = {item['target_delta']:g} for its lifetime "
            f"({item['epsilon_per_run']:g} per run), relation {item['relation']}, {item['declared_records']} declared"
        )
    for warning in found["warnings"]:
        typer.echo(f"warning: {warning}")


def _count(item: str) -> tuple[str, int]:
    """Data set and number of readable records of ``DATASET=PATH``; a faulty file is named with its line."""
    name, separator, path = item.partition("=")
    if not separator or not name or not path:
        raise InvalidInput(f"--data {item}: write DATASET=PATH")
    from client.data import read_rows

    return name, len(list(read_rows(path)))


def register_budget(app: typer.Typer) -> None:
    """Add ``budget`` to the ``client`` commands."""
    app.command("budget")(_budget)


def _budget(
    policy: Annotated[Path, typer.Option("--policy", help="TOML file")],
    ledger: Annotated[Path, typer.Option("--ledger", help="the organisation's own ledger")],
    as_json: Json = False,
) -> None:
    """Show what each data set has spent over all runs and coordinators, and what is left."""
    found = budgets(policy, ledger)
    if as_json:
        typer.echo(json.dumps({name: {**vars(item), "left": item.left} for name, item in found.items()}))
        return
    for name, item in found.items():
        typer.echo(
            f"{name}: ε {item.epsilon:.4g} of {item.target_epsilon:g}, left {item.left:.4g}; "
            f"δ {item.delta:g} of {item.target_delta:g}"
        )
