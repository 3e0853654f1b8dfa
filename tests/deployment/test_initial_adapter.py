"""An adapter that does not start at zero: a classifier with a head, A and B both trained, on loopback."""

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from books import accounted, began
from loopback import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = 'task = "classification"\naggregation = "fedavg"\npooling = "mean"\n'
COLUMNS = 'prompt-column = "text"\nlabel-column = "label"\n'


def notes(number, count=200):
    chooser = random.Random(number)
    words = {"no": ("calm", "well", "quiet"), "yes": ("pain", "fever", "cough")}
    labels = [chooser.choice(("no", "yes")) for _ in range(count)]
    return [{"text": " ".join(chooser.choices(words[label], k=4)), "label": label} for label in labels]


@pytest.fixture
def federation(tmp_path, tiny_bert):
    with tempfile.TemporaryDirectory(prefix="cl-") as sockets:
        made = Loopback(
            tmp_path, Path(sockets), backbone=tiny_bert, records=notes, run=f'{SETTINGS}model = "{tiny_bert}"\n',
            trainer=f'{SETTINGS}{COLUMNS}classes = ["no", "yes"]\n',
        )  # fmt: skip
        try:
            made.start_all()
            yield made
        finally:
            made.stop()


def test_a_classifier_whose_a_and_b_are_trained_begins_at_the_file_that_was_submitted(federation, tmp_path, tiny_bert):
    without = federation.wait_end(run := federation.submit(rounds=2))
    assert (without["state"], without["exit_code"]) == ("failed", 2)
    assert "cloister coordinator initial RUN.toml --output initial.npz" in without["error"]
    assert began(federation, "east", run) == []

    initial = tmp_path / "initial.npz"
    made = federation.call(
        "coordinator", "initial", str(tmp_path / "run.toml"), "--output", str(initial), "--classes", "no,yes"
    )
    assert made.returncode == 0, made.stderr
    run = federation.submit(rounds=2, initial=initial)
    ended = federation.wait_end(run)
    assert ended["state"] == "finished", ended
    folder = federation.home / "runs" / run
    with np.load(initial) as before, np.load(folder / "adapter.npz") as after:
        assert set(before.files) == set(after.files)
        assert {"lora_A", "lora_B"} <= {part for name in after.files for part in name.split(".")}
        assert any("classifier" in name for name in after.files)
        assert all(np.any(before[name] != after[name]) for name in after.files)
    for name in federation.names:
        assert len(began(federation, name, run)) == len(accounted(federation, name, run)) == 2

    built = federation.call(
        "adapter", "build", str(folder), "--model", str(tiny_bert), "--output", str(tmp_path / "adapter"), "--classes",
        "no,yes",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    public = tmp_path / "public.jsonl"
    public.write_text("".join(json.dumps(note) + "\n" for note in notes(99, 50)))
    scored = federation.call(
        "evaluate", "--adapter", str(tmp_path / "adapter"), "--eval-data", str(public), "--model", str(tiny_bert),
        "--prompt-column", "text", "--label-column", "label", "--json",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["count"] == 50
