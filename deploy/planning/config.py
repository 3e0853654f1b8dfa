"""``cloister plan --config``: what every organisation of a run will spend, from settings alone.

The terms are drawn up by the same code as in the run (``server/terms.py``), so the ε here is the run's ε. Every
organisation must have ``declared-records`` in its ``[clients.NAME]`` table: no data is opened to find it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from common.config import RunConfig
from common.errors import InvalidInput
from common.messages import Description
from common.privacy import Relation
from deploy.planning.plan import ClientPlan, FederationReport, federation_report
from server.terms import draw_up


def plan_from_config(path: Path) -> FederationReport:
    """The report of a whole federation.

    Raises:
        InvalidInput: the file is wrong, names no organisation, leaves out a declared size, or plans without privacy.
    """
    config = RunConfig.load(path, {})
    if config.no_privacy:
        raise InvalidInput(f"{path}: no-privacy = true: there is no ε to plan")
    if not config.clients:
        raise InvalidInput(f"{path}: no [clients.NAME] table: name every organisation with its declared-records")
    descriptions = []
    for name, settings in config.clients.items():
        if settings.declared_records is None:
            raise InvalidInput(f"{path}: [clients.{name}] has no declared-records: a plan opens no data to count them")
        descriptions.append(_described(name, settings.declared_records))
    terms = draw_up(config, descriptions, run_id="plan")
    clients = [
        ClientPlan(client.name, client.envelope.events, client.target_delta, client.target_epsilon)
        for client in terms.clients
        if client.envelope is not None and client.target_delta is not None
    ]
    return federation_report(clients, relation=cast(Relation, terms.relation))


def _described(name: str, declared: int) -> Description:
    """What a client would say of itself, as far as a plan needs it."""
    return Description(name, name, "", declared, "", {}, (), "")
