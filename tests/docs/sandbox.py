"""A folder in which the commands of one page are run, in order, as a reader would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from blocks import ROOT, Block

from deploy.demo.records import generate

LIMIT_S = 1500
"""A busy machine is no failure."""


class Sandbox:
    """Runs blocks in ``folder``; ``bin`` comes first on the path."""

    def __init__(self, folder: Path, bin_folder: Path):
        self.folder, self._services = folder, []
        for name in ("docs", "deploy"):
            (folder / name).symlink_to(ROOT / name)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))},
            "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
        }

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, "utf-8")

    def play(self, block: Block, *, added: str = "") -> str:
        """What a block's comment asks for; returns what it printed."""
        if block.mark == "file":
            self.write(block.value, block.text)
        elif block.mark == "background":
            return self._start(block)
        elif block.is_shell:
            return self._run(block, added)
        return ""

    def _run(self, block: Block, added: str) -> str:
        script = "\n".join(
            f"{line} {added}" if added and line.startswith("cloister simulate") else line for line in block.commands()
        )
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=self.folder, env=self.environment, timeout=LIMIT_S,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        expected = int(block.value) if block.mark == "exit" else 0
        assert done.returncode == expected, f"{block.place}: exit code {done.returncode}\n{script}\n\n{done.stdout}"
        self._remember(done.stdout)
        return done.stdout

    def _remember(self, printed: str) -> None:
        """What a page writes as $COORDINATOR_KEY stands for the key that a command printed as the coordinator's."""
        for party, key in re.findall(r"^(coordinator|accountant) [0-9a-f]+ +public key (\S+)", printed, re.MULTILINE):
            self.environment[f"{party.upper()}_KEY"] = key

    def _start(self, block: Block) -> str:
        log = self.folder / f".service-{len(self._services)}.log"
        (command,) = block.commands()
        with log.open("w") as file:
            service = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._services.append(service)
        deadline = time.monotonic() + 120
        while block.value not in log.read_text("utf-8"):
            assert service.poll() is None, f"{block.place}: has ended\n{log.read_text('utf-8')}"
            assert time.monotonic() < deadline, f"{block.place}: never said {block.value!r}\n{log.read_text('utf-8')}"
            time.sleep(0.1)
        self._remember(log.read_text("utf-8"))
        return log.read_text("utf-8")

    def close(self) -> None:
        """Stop the services, the last one first."""
        for service in reversed(self._services):
            service.send_signal(signal.SIGTERM)
        for service in self._services:
            try:
                service.wait(40)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()


def records(count: int) -> str:
    """JSONL of two hospitals with ``count`` records each."""
    rows = [
        {"hospital": name, "question": record["prompt"], "answer": record["completion"]}
        for number, name in enumerate(("north", "south"))
        for record in generate("north-clinic", count, seed=number)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
