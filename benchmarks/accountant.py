"""The accountant against its peers, in one process, A B A B; ratios with their spread.

    python benchmarks/accountant.py [vectors|random|rounds|oneshot|clients|edgeworth|noise|all] [--settings N]

``random`` draws settings log-uniformly (q 1e-4…1, σ 0.4…10, T 1…1e5, δ 1e-4…1e-8) and keeps those whose Rényi ε lies in
[0.1, 50]. Needs the ``dev`` extra (dp-accounting, prv-accountant) and Flower.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant as GooglePLD
from dp_accounting.pld import privacy_loss_distribution as google_pld
from dp_accounting.rdp import RdpAccountant as GoogleRDP

from common.privacy import (
    EdgeworthAccountant,
    PLDAccountant,
    RDPAccountant,
    SampledGaussian,
    TooLarge,
    calibrate_noise_multiplier,
    grids,
    pld,
)
from common.privacy import composition as composition_module

VECTORS = Path(__file__).parent.parent / "tests" / "privacy" / "vectors.json"
CELLS = [(sigma, steps) for sigma in (0.6, 1.0, 2.0) for steps in (100, 1000, 10_000)]  # q = 0.01, delta = 1e-5


def machine() -> str:
    """Name the machine, so that a figure can be placed."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    load = os.getloadavg()[0]
    python = f"Python {platform.python_version()}, numpy {np.__version__}"
    return f"{model}, {os.cpu_count()} cores (one used), load {load:.1f}, {python}"


def google(event: SampledGaussian, spacing: float) -> GooglePLD:
    """Compose one event with dp-accounting's PLD."""
    accountant = GooglePLD(value_discretization_interval=spacing)
    step = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
    accountant.compose(SelfComposedDpEvent(step, event.steps))
    return accountant


def optimistic(event: SampledGaussian, delta: float) -> float:
    """Return dp-accounting's optimistic ε at 1e-4."""
    step = google_pld.from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier,
        pessimistic_estimate=False,
        value_discretization_interval=1e-4,
        sampling_prob=event.sample_rate,
        use_connect_dots=False,
    )
    return step.self_compose(event.steps).get_epsilon_for_delta(delta)


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Return seconds of CPU time (steadier than wall time on a shared machine) and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 2
) -> tuple[str, float, float, float]:
    """Run A B A B; return the ratios as text, their median, and the best seconds of both."""
    pairs = [(timed(theirs)[0], timed(ours)[0]) for _ in range(repeats)]
    ratios = [theirs_s / ours_s for theirs_s, ours_s in pairs]
    text = f"{statistics.median(ratios):.1f}× ({min(ratios):.1f}–{max(ratios):.1f})"
    return text, statistics.median(ratios), min(p[1] for p in pairs), min(p[0] for p in pairs)


def vectors() -> list[list[str]]:
    """Every stored vector of a composition: ours against the stored bound."""
    rows = [["vector", "ε", "lower side", "stored upper bound", "ours / stored − 1"]]
    for vector in json.loads(VECTORS.read_text())["vectors"]:
        if vector["mechanism"] not in ("poisson_gaussian", "gaussian"):
            continue
        held = PLDAccountant(vector.get("relation", "add_remove"))
        held = held.compose_all(SampledGaussian(sigma, q, steps) for q, sigma, steps in vector["rounds"])
        expect = vector["expect"]
        stored = next(expect[k] for k in ("eps_exact", "eps_pld_pess_h1e-4", "eps_pld_pess_h1e-3") if k in expect)
        found = held.epsilon(vector["delta"])
        lower = held.epsilon_lower(vector["delta"])
        rows.append([vector["id"], f"{found:.5f}", f"{lower:.5f}", f"{stored:.5f}", f"{found / stored - 1:+.1e}"])
    return rows


def random(settings: int) -> list[list[str]]:
    """Compare log-uniform settings with dp-accounting's two sides; a row per violation, then a summary."""
    rng, worst, ours_s, theirs_s = np.random.default_rng(0), -1.0, 0.0, 0.0
    kept = above = below = refused = 0
    outside, unsound = 0, 0
    rows = [["q", "σ", "T", "δ", "ours", "pessimistic", "optimistic"]]
    while kept < settings:
        q, sigma = (
            float(np.exp(rng.uniform(math.log(1e-4), 0))),
            float(np.exp(rng.uniform(math.log(0.4), math.log(10)))),
        )
        steps, delta = round(math.exp(rng.uniform(0, math.log(1e5)))), float(10 ** rng.uniform(-8, -4))
        event = SampledGaussian(sigma, q, steps)
        by_rdp = RDPAccountant().compose(event).epsilon(delta)
        if not 0.1 <= by_rdp <= 50:
            outside += 1
            try:  # a sound bound or a refusal: never above Rényi by more than its grid, never below the lower side
                held = PLDAccountant().compose(event)
                unsound += not held.epsilon_lower(delta) <= held.epsilon(delta) <= max(by_rdp * 1.01, 1e-3)
            except TooLarge:
                refused += 1
            continue
        kept += 1
        seconds, ours = timed(lambda event=event, delta=delta: PLDAccountant().compose(event).epsilon(delta))
        ours_s += seconds
        seconds, upper = timed(lambda event=event, delta=delta: google(event, 1e-4).get_epsilon(delta))
        theirs_s += seconds
        lower = optimistic(event, delta)
        worst = max(worst, ours / upper - 1 if upper else 0.0)
        if ours > 1.001 * upper or ours < lower:
            above, below = above + (ours > 1.001 * upper), below + (ours < lower)
            rows.append(
                [f"{q:.6f}", f"{sigma:.4f}", str(steps), f"{delta:.2e}", *(f"{x:.6f}" for x in (ours, upper, lower))]
            )
    rows.append([f"kept {kept}", f"above 1.001× pessimistic: {above}", f"below optimistic: {below}"])
    rows[-1] += [f"worst {worst:+.1e}", f"{theirs_s / ours_s:.0f}× faster in total", f"outside [0.1, 50]: {outside}"]
    rows[-1] += [f"refused there {refused}, neither bound nor refusal {unsound}"]
    return rows


def distinct_rounds(count: int) -> list[SampledGaussian]:
    """Rounds that all differ: q in [.005, .015], σ in [.8, 1.5]."""
    rng = np.random.default_rng(0)
    rates, noises = rng.uniform(0.005, 0.015, count), rng.uniform(0.8, 1.5, count)
    return [SampledGaussian(float(sigma), float(q)) for q, sigma in zip(rates, noises, strict=True)]


def ours_by_round(events: list[SampledGaussian]) -> tuple[float, list[float]]:
    """Return ε after the last round and the seconds of each, from cold caches."""
    composition_module.clear_caches()
    held, seconds, epsilon = PLDAccountant(), [], 0.0
    for event in events:
        start = time.process_time()
        held = held.compose(event)
        epsilon = held.epsilon(1e-5)
        seconds.append(time.process_time() - start)
    return epsilon, seconds


def peer_by_round(make: Callable[[], GooglePLD | GoogleRDP], events: list[SampledGaussian]) -> float:
    """Return a dp-accounting accountant's ε, asked after every round."""
    held, epsilon = make(), 0.0
    for event in events:
        held.compose(PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier)))
        epsilon = held.get_epsilon(1e-5)
    return epsilon


def rounds() -> list[list[str]]:
    """100 distinct rounds with an ε after each; Flower's would_exceed at round 59; growth with the round."""
    from common.privacy import rdp as rdp_module

    events = distinct_rounds(100)
    rows = [["100 distinct rounds, ε after each", "ours (s)", "theirs (s)", "ratio A B A B", "asked"]]
    text, _, ours, theirs = alternate(
        lambda: ours_by_round(events),
        lambda: peer_by_round(lambda: GooglePLD(value_discretization_interval=1e-3), events),
    )
    rows.append(["PLD against dp-accounting PLD at 1e-3", f"{ours:.2f}", f"{theirs:.2f}", text, "≥ 10×"])

    def ours_rdp() -> float:
        rdp_module._rdp.cache_clear()
        held = RDPAccountant()
        for event in events:
            held = held.compose(event)
            held.epsilon(1e-5)
        return held.epsilon(1e-5)

    text, _, ours, theirs = alternate(lambda: ours_by_round(events), lambda: peer_by_round(GoogleRDP, events))
    rows.append(["PLD against dp-accounting RDP", f"{ours:.2f}", f"{theirs:.2f}", text, "≥ 5×"])
    text, _, ours, theirs = alternate(ours_rdp, lambda: peer_by_round(GoogleRDP, events))
    rows.append(["RDP against dp-accounting RDP", f"{ours:.3f}", f"{theirs:.2f}", text, "≥ 5×"])
    rows.append(flower_row(events))
    epsilon, _ = ours_by_round(events)
    fine = GooglePLD(value_discretization_interval=1e-4)
    for event in events[:100]:
        fine.compose(PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier)))
    exact = fine.get_epsilon(1e-5)
    rows.append(
        [
            f"ε {epsilon:.6f} against {exact:.6f} (dp-accounting at 1e-4)",
            "",
            "",
            f"{epsilon / exact - 1:+.1e}",
            "≤ 1e-3",
        ]
    )
    _, many = ours_by_round(distinct_rounds(400))
    early, late = statistics.median(many[50:150]), statistics.median(many[300:])
    rows.append(
        ["median round 50–150 → 300–400 (ms)", f"{1e3 * early:.1f}", f"{1e3 * late:.1f}", f"{late / early:.1f}×", ""]
    )
    return rows


def flower_row(events: list[SampledGaussian]) -> list[str]:
    """Flower replays its history in would_exceed; ours composes one event on what it holds."""
    from flwr.supercore.privacy_accounting import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        SamplingMethod,
    )
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant as FlowerRDP

    population = 1_000_000
    config = PrivacyConfig(
        target_delta=1e-5,
        population_size=population,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.POISSON,
        max_epsilon=8.0,
    )
    asked = [
        GaussianPrivacyEvent(
            noise_multiplier=e.noise_multiplier,
            sample_size=round(e.sample_rate * population),
            population_size=population,
        )
        for e in events
    ]
    flower = FlowerRDP(config)
    for event in asked[:59]:
        flower.compose(event)
    held = PLDAccountant().compose_all(events[:59])
    held.epsilon(1e-5)
    fresh = iter(events[60:])
    text, _, ours, theirs = alternate(
        lambda: held.compose(next(fresh)).epsilon(1e-5) > 8.0, lambda: flower.would_exceed(asked[59]), repeats=3
    )
    return ["one question at round 59 against Flower's would_exceed", f"{ours:.4f}", f"{theirs:.2f}", text, "≥ 50×"]


def oneshot() -> list[list[str]]:
    """One query each on the nine cells, from cold caches."""
    rows = [["σ, T (q .01, δ 1e-5)", "ours (ms)", "dp-accounting at 1e-4 (ms)", "ratio A B A B A B", "ε / its ε − 1"]]
    for sigma, steps in CELLS:
        event = SampledGaussian(sigma, 0.01, steps)

        def ours(event: SampledGaussian = event) -> float:
            composition_module.clear_caches()
            return PLDAccountant().compose(event).epsilon(1e-5)

        text, _, mine, theirs = alternate(ours, lambda event=event: google(event, 1e-4).get_epsilon(1e-5), repeats=3)
        error = ours() / google(event, 1e-4).get_epsilon(1e-5) - 1
        rows.append([f"{sigma}, {steps}", f"{1e3 * mine:.1f}", f"{1e3 * theirs:.0f}", text, f"{error:+.1e}"])
    return rows


def clients(count: int = 1000, length: int = 100) -> list[list[str]]:
    """Many clients through one shared cache: ten plans, and all rounds of all clients distinct."""
    rows = [
        [
            f"{count} clients × {length} rounds, ε after each",
            "seconds (CPU)",
            "ms per client and round",
            "peak memory (MiB)",
        ]
    ]
    for name, kinds in (("ten distinct plans", 10), ("all distinct", count)):
        composition_module.clear_caches()
        rng = np.random.default_rng(1)
        plans = []
        for _ in range(kinds):
            noises, rates = rng.uniform(0.8, 1.5, length), rng.uniform(0.005, 0.015, length)
            plans.append([SampledGaussian(float(s), float(q)) for s, q in zip(noises, rates, strict=True)])
        start, held = time.process_time(), [PLDAccountant() for _ in range(count)]
        for server_round in range(length):
            for client in range(count):
                held[client] = held[client].compose(plans[client % kinds][server_round])
                held[client].epsilon(1e-5)
        spent = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append([name, f"{spent:.1f}", f"{1e3 * spent / count / length:.2f}", f"{peak:.0f}"])
    return rows


def edgeworth() -> list[list[str]]:
    """Error of the estimates against a fine PLD, in percent, per regime."""
    before = grids.TOLERANCE, pld.TOLERANCE
    composition_module.clear_caches()
    grids.TOLERANCE = pld.TOLERANCE = 3e-6
    rows = [["σ, q, T", "ε", "plain 1", "plain 2", "plain 3", "tilted 2", "tilted 3", "skewness", "in regime"]]
    more = [(1.0, 0.05, 1000), (1.0, 0.2, 100), (2.0, 0.05, 100), (0.62, 0.0297, 101), (0.8, 0.1, 20), (1.5, 0.5, 10)]
    for sigma, q, steps in [(s, 0.01, t) for s, t in CELLS] + more:
        event = SampledGaussian(sigma, q, steps)
        exact = PLDAccountant().compose(event).epsilon(1e-5)
        plain = [EdgeworthAccountant(o, tilted=False).compose(event).estimate(1e-5).epsilon for o in (1, 2, 3)]
        tilted = [EdgeworthAccountant(o, tilted=True).compose(event).estimate(1e-5) for o in (2, 3)]
        errors = [f"{100 * (x / exact - 1):+.1f}" for x in plain]
        errors += [f"{100 * (x.epsilon / exact - 1):+.4f}" for x in tilted]
        rows.append(
            [f"{sigma}, {q}, {steps}", f"{exact:.4f}", *errors, f"{tilted[0].skewness:+.2f}", str(tilted[0].in_regime)]
        )
    grids.TOLERANCE, pld.TOLERANCE = before
    composition_module.clear_caches()
    return rows


def noise() -> list[list[str]]:
    """Noise saved against Rényi accounting on EW-Tune's four tasks (30 epochs, δ 1e-5)."""
    rows = [["task (records, batch)", "ε", "σ by RDP", "σ by PLD, certified", "noise saved", "EW-Tune's claim"]]
    tasks = [("SST-2", 67_349, 2000), ("QNLI", 104_743, 4000), ("QQP", 363_846, 12_000), ("MNLI", 392_702, 14_000)]
    for epsilon in (8.0, 3.0):
        for name, records, batch in tasks:
            fixed = {"sample_rate": batch / records, "steps": math.ceil(30 * records / batch)}
            target = {"target_epsilon": epsilon, "target_delta": 1e-5, **fixed}
            ours = calibrate_noise_multiplier(**target)
            by_rdp = calibrate_noise_multiplier(**target, accountant=RDPAccountant)
            rows.append(
                [
                    f"{name} ({records}, {batch})",
                    f"{epsilon:g}",
                    f"{by_rdp:.4f}",
                    f"{ours:.4f}",
                    f"{1 - ours / by_rdp:.1%}",
                    "up to 5.6 %",
                ]
            )
    return rows


def show(title: str, rows: list[list[str]]) -> None:
    """Print rows as a markdown table."""
    print(f"\n### {title}\n")
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + " |", flush=True)
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def main() -> None:
    """Run the parts asked for."""
    parts: dict[str, Callable[[], list[list[str]]]] = {
        "oneshot": oneshot, "rounds": rounds, "vectors": vectors, "edgeworth": edgeworth, "noise": noise,
        "random": lambda: random(arguments.settings), "clients": lambda: clients(arguments.clients),
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", default=["all"], help=", ".join(parts))
    parser.add_argument("--settings", type=int, default=200, help="how many random settings to keep")
    parser.add_argument("--clients", type=int, default=1000, help="how many clients")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(machine())
    for name, part in parts.items():
        if "all" in arguments.part or name in arguments.part:
            show(name, part())


if __name__ == "__main__":
    main()
