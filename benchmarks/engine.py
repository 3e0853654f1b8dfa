"""What a private LoRA step costs, against its own non-private twin, stock peft, Opacus and vmap.

    python benchmarks/engine.py                  every CPU case, one thread (about half an hour on a free core)
    python benchmarks/engine.py --case h256-qv      one case
    python benchmarks/engine.py --memory            peak resident memory, fresh processes
    python benchmarks/engine.py --device cuda       shapes of a 1B and a 7B model, unattended; about an hour on one GPU
    add --log to append the table to benchmarks/LOG.md

All arms of a case take the same batch and run interleaved, in a new random order in every round; an arm's figure is the
median over rounds of its time divided by another arm's time in the same round, with a 95 % bootstrap interval. ``stock
again`` is the same code as ``stock``: the run counts only if its ratio is within 1 ± 0.01. Process CPU time on a CPU,
CUDA events on a GPU. A step is forward, backward, clipping, noise where there is any, and Adam's update.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from engine_arms import ARMS, PEERS, Case, Step, build, made_up

from client.engine.fused import FusedRows

LOG = Path(__file__).with_name("LOG.md")
QUERY_VALUE = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


SMALL = Case("h256-qv", 256, 688, 2, 4, 4, 2048, 16, 128, 8, QUERY_VALUE)
WIDE = replace(SMALL, name="h512-qv", hidden=512, inner=1376, heads=8, kv_heads=8, batch=8, length=256)
CPU_CASES = (
    SMALL,
    replace(SMALL, name="h256-all", targets=ALL_LINEAR),
    replace(SMALL, name="h256-completion", vocab=8192, labels=0.25, full_stock=True, peers=False),
    WIDE,
    replace(WIDE, name="h512-all", targets=ALL_LINEAR),
)


def cuda_cases() -> tuple[Case, ...]:
    """Shapes of a 1B and a 7B model x length x rank x targets x checkpointing."""
    one = Case("1b", 2048, 8192, 16, 32, 8, 128256, 16, 512, 8, QUERY_VALUE, dtype=torch.bfloat16, peers=False)
    seven = replace(one, name="7b", hidden=4096, inner=11008, layers=32, kv_heads=32, vocab=32000)
    out = []
    for shape in (one, seven):
        for length in (512, 2048):
            for rank in (8, 64):
                for targets, label in ((QUERY_VALUE, "qv"), (ALL_LINEAR, "all")):
                    for checkpoint in (False, True):
                        name = f"{shape.name}-t{length}-r{rank}-{label}" + ("-ckpt" if checkpoint else "")
                        batch = 8192 // length
                        out.append(
                            replace(
                                shape, name=name, batch=batch, length=length, rank=rank, targets=targets,
                                checkpoint=checkpoint,
                            )
                        )  # fmt: skip
    return tuple(out)


# Measuring


def seconds_of(step: Step, device: str) -> float:
    """Process CPU seconds, or GPU seconds between two events."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(steps: dict[str, Step], device: str, rounds: int, every: dict[str, int]) -> dict[str, np.ndarray]:
    """Seconds per arm and round, NaN where an arm sat the round out (``every`` > 1)."""
    rng = np.random.default_rng(0)
    seconds = {name: np.full(rounds, np.nan) for name in steps}
    for step in steps.values():
        step()
        step()
    for turn in range(rounds):
        for name in rng.permutation([name for name in steps if turn % every.get(name, 1) == 0]):
            seconds[name][turn] = seconds_of(steps[name], device)
    return seconds


def ratio(seconds: dict[str, np.ndarray], above: str, below: str) -> dict[str, float]:
    """Median of paired ratios and its 95 % bootstrap interval."""
    pairs = seconds[above] / seconds[below]
    pairs = pairs[np.isfinite(pairs)]
    draws = np.random.default_rng(0).choice(pairs, (4000, len(pairs)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(pairs)), "low": float(low), "high": float(high), "pairs": len(pairs)}


def run_case(case: Case, device: str, rounds: int, peer_every: int) -> dict:
    """Time all arms of one case; shrink the batch on a GPU until every arm fits."""
    while True:
        try:
            return _run_case(case, device, rounds, peer_every)
        except torch.OutOfMemoryError:
            pass  # its traceback holds the failed tensors until this block is left
        gc.collect()
        torch.cuda.empty_cache()
        if case.batch == 1:
            return {"case": case.name, "batch": 0, "note": "does not fit with one example"}
        case = replace(case, batch=case.batch // 2)


def _run_case(case: Case, device: str, rounds: int, peer_every: int) -> dict:
    batch = made_up(case, device)
    model = build(case, device)
    # On a GPU the arms share the frozen weights; each has its own adapter values only through its own optimizer.
    own = (lambda: model) if device == "cuda" else (lambda: copy.deepcopy(model))
    arms = ARMS | (PEERS if case.peers else {})
    steps = {name: arm(own(), batch, case) for name, arm in arms.items()}
    seconds = measure(steps, device, rounds, dict.fromkeys(PEERS, peer_every))
    result = {"case": case.name, "batch": case.batch, "seconds": float(np.nanmedian(seconds["stock"])), "ratios": {}}
    for above, below in [("stock again", "stock"), ("private", "twin"), ("private", "stock"), ("twin", "stock")]:
        result["ratios"][f"{above} / {below}"] = ratio(seconds, above, below)
    for peer in PEERS if case.peers else ():
        result["ratios"][f"{peer} / stock"] = ratio(seconds, peer, "stock")
        result["ratios"][f"private / {peer}"] = ratio(seconds, "private", peer)
    if device == "cuda":
        result["mib"] = {name: gpu_peak(steps[name]) for name in ARMS}
    result["valid"] = abs(result["ratios"]["stock again / stock"]["median"] - 1) <= 0.01
    return result


def gpu_peak(step: Step) -> float:
    """MiB of GPU memory at the peak of one step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


# Memory on a CPU: fresh processes


def peak_of_one(case: Case, arm: str) -> dict[str, float]:
    """In this (fresh) process: MiB above what is resident before the first step."""
    torch.set_num_threads(1)
    model, batch = build(case, "cpu"), made_up(case, "cpu")
    step = ARMS[arm](model, batch, case)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**10
    arena = FusedRows(model).arena.bytes_per_example * case.batch / 2**20
    return {"peak": peak - before, "arena": arena, "maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def memory_table(cases: tuple[Case, ...], repeats: int) -> list[dict]:
    """Median over fresh processes of each arm's peak above its resident start."""
    rows = []
    for case in cases:
        found: dict[str, list[float]] = {"stock": [], "private": []}
        for _ in range(repeats):
            for arm in found:
                command = [sys.executable, __file__, "--peak-of", case.name, arm]
                answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                found[arm].append(answer["peak"])
        medians = {arm: float(np.median(values)) for arm, values in found.items()}
        rows.append(
            {"case": case.name, "arena": answer["arena"], **medians, "spread": {a: np.ptp(v) for a, v in found.items()}}
        )
    return rows


# Reporting


def show(value: dict[str, float]) -> str:
    """`1.012 [1.004, 1.019]`."""
    return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def report(results: list[dict], device: str) -> str:
    """A Markdown table of ratios."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, one thread, process CPU time"
    lines = [f"{where}; torch {torch.__version__}; median of paired ratios [95 % bootstrap interval]", ""]
    for result in results:
        if "ratios" not in result:
            lines.append(f"- **{result['case']}**: {result['note']}")
            continue
        control = "control holds" if result["valid"] else "CONTROL FAILS, does not count"
        lines.append(
            f"- **{result['case']}** (batch {result['batch']}, stock {result['seconds']:.3f} s a step, "
            f"{result['ratios']['private / stock']['pairs']} pairs, {control})"
        )
        lines += [f"  - {name}: {show(value)}" for name, value in result["ratios"].items()]
        if "mib" in result:
            lines.append("  - peak MiB: " + ", ".join(f"{name} {mib:.0f}" for name, mib in result["mib"].items()))
    return "\n".join(lines)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", action="append", help="only this case; may be repeated")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--peer-every", type=int, default=3, help="peers run in every n-th round")
    parser.add_argument("--batch", type=int, help="examples in a batch, instead of the case's own number")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    parser.add_argument("--log", action="store_true", help="append to benchmarks/LOG.md")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = cuda_cases() if asked.device == "cuda" else CPU_CASES
    if asked.peak_of:
        case = next(c for c in cases if c.name == asked.peak_of[0])
        print(json.dumps(peak_of_one(case, asked.peak_of[1])))
        return
    if asked.case:
        cases = tuple(case for case in cases if case.name in asked.case)
    if asked.batch:
        cases = tuple(replace(case, batch=asked.batch) for case in cases)
    title = f"\n## {datetime.date.today()} engine ({_commit()})\n\n"
    if asked.memory:
        lines = [
            f"- **{row['case']}**: peak above the start, MiB: stock {row['stock']:.1f}, private {row['private']:.1f} "
            f"(of it arena {row['arena']:.1f}); spread {row['spread']['stock']:.1f}, {row['spread']['private']:.1f}"
            for row in memory_table(cases, asked.repeats)
        ]
        text = f"Peak memory, median of {asked.repeats} fresh processes, three steps each\n\n" + "\n".join(lines)
    else:
        torch.set_num_threads(1) if asked.device == "cpu" else None
        results = []
        for case in cases:
            results.append(run_case(case, asked.device, asked.rounds, asked.peer_every))
            print(report(results[-1:], asked.device), flush=True)
        text = report(results, asked.device)
    if asked.log:
        with LOG.open("a", encoding="utf-8") as file:
            file.write(title + text + "\n")
    elif asked.memory:
        print(text)


if __name__ == "__main__":
    main()
