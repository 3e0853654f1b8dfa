"""Flower's simulation engine on Ray runs the same code: one seed, one adapter, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def simulate(options: dict[str, object]) -> dict:
    """In a process of its own: Ray changes the process it lives in."""
    arguments = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "simulate", "--json", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_backends_give_the_same_adapter_bit_for_bit(tmp_path, options):
    pytest.importorskip("ray")
    found = {
        backend: simulate(options(tmp_path / backend, rounds=2, seed=1, threads=1, backend=backend))
        for backend in ("inprocess", "ray")
    }
    files = [tmp_path / backend / "adapter" / "adapter_model.safetensors" for backend in found]
    assert files[0].read_bytes() == files[1].read_bytes()
    same = ("rounds", "score", "loss", "epsilon", "delta", "private")
    assert {name: found["inprocess"][name] for name in same} == {name: found["ray"][name] for name in same}
