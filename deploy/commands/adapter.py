"""``cloister adapter build``: what a federation's run left, as a folder that ``peft`` loads.

The coordinator has no torch, so a run ends with ``adapter.npz``, the trained tensors. Where torch and the backbone
are, this makes the folder that a simulation writes itself, once the certificate has agreed with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from common.certificate import Certificate, statement, verify_certificate
from common.config import RunConfig
from common.errors import InvalidInput, Refused
from common.messages import adapter_hash
from deploy.reporting.folders import replace_folder

adapter_app = typer.Typer(name="adapter", help="Put to use what a federation has trained.", no_args_is_help=True)


@adapter_app.callback()
def _adapter() -> None:
    """Put to use what a federation has trained."""


def build(run: Path, model: str, output: Path, classes: tuple[str, ...] = ()) -> Certificate:
    """Make the adapter folder of a run.

    Args:
        run: folder with ``run.toml``, ``adapter.npz`` and ``certificate.json``.
        model: the backbone's folder.
        output: must not exist.
        classes: names of the classes in their public order (classification).

    Raises:
        InvalidInput: something is missing, or ``output`` exists.
        Refused: the certificate is of another adapter, or the backbone is another one than was trained on.
        LedgerCorrupt: the certificate does not verify.
    """
    from deploy.reporting.statements import SETTINGS
    from deploy.workshop import WITHOUT_RECORDS, open_workshop
    from server.deployed import read_adapter

    if output.exists():
        raise InvalidInput(f"{output}: exists already, and nothing is overwritten")
    for name in ("run.toml", "adapter.npz", "certificate.json"):
        if not (run / name).is_file():
            raise InvalidInput(f"{run / name}: missing; give the folder of a finished run")
    arrays = read_adapter(run / "adapter.npz")
    certificate = verify_certificate(run / "certificate.json").certificate
    if adapter_hash(arrays) != certificate.adapter_hash:
        raise Refused(f"{run / 'adapter.npz'}: not the adapter that the certificate speaks of")
    config = RunConfig.load(run / "run.toml", {"model": model, **WITHOUT_RECORDS})
    workshop = open_workshop(config, classes, test=False)
    if workshop.workbench.backbone_hash != certificate.backbone_hash:
        raise Refused(f"{model}: another backbone than the run's ({certificate.backbone_hash})")
    settings = {
        "task": config.task,
        "classes": list(classes),
        "max_length": workshop.max_length,
        "backbone_hash": certificate.backbone_hash,
        "aggregation": config.aggregation,
        "public_seed": config.public_seed,
    }

    def write(folder: Path) -> None:
        workshop.save(arrays, folder)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        (folder / "certificate.json").write_bytes((run / "certificate.json").read_bytes())
        (folder / "README.md").write_text(card(certificate), "utf-8")

    replace_folder(output, write)
    return certificate


def card(certificate: Certificate) -> str:
    """The adapter's README: what it is, and the privacy statement."""
    return (
        "---\nlibrary_name: peft\ntags:\n- lora\n- differential-privacy\n- federated-learning\n---\n"
        f"# LoRA adapter of run {certificate.run_id}\n\n"
        f"Trained by {len(certificate.epsilons)} organisations in {certificate.rounds_run} rounds on the backbone with "
        f"hash `{certificate.backbone_hash[:16]}…`. `certificate.json` beside it can be verified by anybody.\n\n"
        f"## Privacy\n\n{statement(certificate)}\n"
    )


@adapter_app.command("build")
def _build(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run, as 'runs show' names it")],
    model: Annotated[str, typer.Option("--model", help="folder of the backbone it was trained on")],
    output: Annotated[Path, typer.Option("--output", help="folder to make")],
    classes: Annotated[str | None, typer.Option("--classes", help="comma-separated, as in every trainer.toml")] = None,
) -> None:
    """Make the folder that 'cloister evaluate', 'cloister generate' and peft load; needs torch and the backbone."""
    from deploy.simulation.simulate import quiet_warnings

    with quiet_warnings():
        certificate = build(run, model, output, tuple(classes.split(",")) if classes else ())
    typer.echo(f"{output}: adapter of run {certificate.run_id}, {certificate.rounds_run} rounds")
