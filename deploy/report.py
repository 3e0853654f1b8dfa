"""``report.html``: one file without scripts or outside requests, for the people who decide about privacy."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from common.certificate import Certificate, statement
from server.checkpoint import write_atomically
from server.terms import RunTerms

WIDTH, HEIGHT, MARGIN = 640, 220, 36


def write_report(path: Path, terms: RunTerms, certificate: Certificate, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Write the report and return the statement in plain words that it shows."""
    environment = Environment(
        loader=PackageLoader("deploy", "templates"), autoescape=select_autoescape(["html"]), trim_blocks=True
    )
    text = statement(certificate)
    names = [client.name for client in terms.clients]
    page = environment.get_template("report.html").render(
        terms=terms,
        certificate=certificate,
        metrics=metrics,
        names=names,
        statement=text,
        score=_curve([(line["round"], line["score"]) for line in metrics], "score per round"),
        epsilon=_epsilon_curve(names, metrics),
    )
    write_atomically(path, page.encode())
    return text


def _epsilon_curve(names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The largest ε over the clients, per round."""
    points = [(line["round"], max(line["epsilon"].values())) for line in metrics if line["epsilon"]]
    return _curve(points, "largest ε of any organisation, per round") if points else ""


def _curve(points: Sequence[tuple[int, float | None]], title: str) -> str:
    """An SVG line; empty when there is nothing to draw."""
    known = [(x, y) for x, y in points if y is not None]
    if len(known) < 2:
        return ""
    low, high = min(y for _, y in known), max(y for _, y in known)
    span = (high - low) or 1.0
    last = max(x for x, _ in known) or 1
    bottom, wide, high_up = HEIGHT - MARGIN, WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    places = " ".join(f"{MARGIN + x / last * wide:.1f},{bottom - (y - low) / span * high_up:.1f}" for x, y in known)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}: from {known[0][1]:.4g} to '
        f'{known[-1][1]:.4g}"><title>{html.escape(title)}</title>'
        f'<line class="axis" x1="{MARGIN}" y1="{bottom}" x2="{WIDTH - MARGIN}" y2="{bottom}"/>'
        f'<line class="axis" x1="{MARGIN}" y1="{MARGIN}" x2="{MARGIN}" y2="{bottom}"/>'
        f'<text x="{MARGIN}" y="{MARGIN - 8}">{high:.4g}</text>'
        f'<text x="{MARGIN + 4}" y="{bottom - 4}">{low:.4g}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 16}" text-anchor="end">round {last}</text>'
        f'<polyline class="line" points="{places}"/></svg>'
    )
