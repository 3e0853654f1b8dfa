"""A federation of plain processes on loopback: the commands of the documentation, each with its own folder and log."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from client.backbone import backbone_hash
from common.signing import SigningKey
from deploy.demo.records import generate
from deploy.running.doctor import free_port
from deploy.running.processes import QUIET
from deploy.workshop import DEMO_BACKBONE

CLOISTER = [sys.executable, "-m", "deploy.cli"]
ENVIRONMENT = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[2]

POLICY = """\
organisation = "{name}"
min-noise-multiplier = 0.1
max-sample-rate = 0.5
max-steps-per-round = 2
backbones = ["{backbone}"]
coordinator-keys = ["{coordinator}"]
accountant-keys = ["{accountant}"]

[datasets.notes]
declared-records = 200
{budget}
"""
BUDGET = "target-epsilon = 8.0"
TRAINER = """\
data = "records.jsonl"
model = "{backbone}"
max-length = 64
rank = 4
threads = 1
address = "unix:{sockets}/{name}.sock"
status = "{sockets}/{name}-status.sock"
stop-after-s = 5
"""
RUN = """\
rounds = {rounds}
expected-batch-size = 8
max-length = 64
rank = 4
quorum = {quorum}
round-deadline-s = 120
server-learning-rate = 0.05
"""


def demo_records(number):
    return generate("county-office", 200, seed=number)


class Loopback:
    """Starts, kills and looks at the processes of one federation, in plain HTTP.

    ``trainer`` and ``run`` are further lines of every trainer.toml and of the run's settings, ``budget`` those of every
    policy.
    """

    def __init__(
        self, folder: Path, sockets: Path, names=("east", "west"), *, backbone=DEMO_BACKBONE, records=demo_records,
        trainer="", run="", budget=BUDGET,
    ):  # fmt: skip
        self.folder, self.sockets, self.names = folder, sockets, names
        self.home = folder / "coordinator"
        self.port, self.run_lines = free_port(), run
        self.processes: dict[str, subprocess.Popen] = {}
        self.provision()
        for number, name in enumerate(names):
            own = folder / name
            own.mkdir(parents=True)
            lines = [json.dumps(record) + "\n" for record in records(number)]
            (own / "records.jsonl").write_text("".join(lines))
            keys = {side: self.public_key(side) for side in ("coordinator", "accountant")}
            policy = POLICY.format(name=name, backbone=backbone_hash(backbone), budget=budget, **keys)
            (own / "policy.toml").write_text(policy)
            settings = TRAINER.format(name=name, backbone=backbone, sockets=sockets)
            (own / "trainer.toml").write_text(settings + self.trainer_lines(name) + trainer)

    def provision(self):
        """The coordinator's keys; here nobody has a certificate."""
        for side in ("coordinator", "accountant"):
            SigningKey.load_or_create(self.home / "keys" / f"{side}.key")

    def trainer_lines(self, name):
        return ""

    def key_file(self, side):
        return self.home / "keys" / f"{side}.key"

    def public_key(self, side):
        return SigningKey.load(self.key_file(side)).public_key

    @property
    def ledger(self):
        """The accountant's."""
        return self.home / "ledger.sqlite"

    def client_ledger(self, name):
        """An organisation's own."""
        return self.folder / name / "ledger.sqlite"

    @property
    def address(self):
        """The SuperLink's, on the coordinator's inner network."""
        return f"127.0.0.1:{self.port}"

    @property
    def authority(self):
        """What the SuperLink's certificate is checked against."""
        return None

    @property
    def control(self):
        """Options of the operator's commands."""
        options = ["--folder", str(self.home), "--superlink", self.address]
        return options if self.authority is None else [*options, "--tls-authority", str(self.authority)]

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def start(self, name, *arguments):
        """One long-lived process; its output goes to a log of its own."""
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [*CLOISTER, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )
        self.processes[name] = process
        return process

    def start_coordinator(self):
        self.start(
            "coordinator", "coordinator", "serve", "--folder", str(self.home), "--port", str(self.port), "--insecure"
        )

    def start_trainer(self, name):
        self.start(f"{name}-trainer", "client", "trainer", "--policy", str(self.folder / name / "policy.toml"))

    def start_node(self, name):
        self.start(
            f"{name}-node", "client", "join", "--coordinator", self.address_for(name), "--insecure", "--trainer",
            f"unix:{self.sockets}/{name}.sock",
        )  # fmt: skip

    def address_for(self, name):
        """Where an organisation's node finds the coordinator."""
        return self.address

    def call(self, *arguments, timeout=300):
        """One command to its end."""
        return subprocess.run(
            [*CLOISTER, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
        )

    def submit(self, rounds=3, quorum=1, initial=None):
        """A run's name, as ``submit`` prints it."""
        settings = self.folder / "run.toml"
        settings.write_text(RUN.format(rounds=rounds, quorum=quorum) + self.run_lines)
        clients = ["--clients", str(len(self.names)), *(["--initial", str(initial)] if initial else [])]
        done = self.call("coordinator", "submit", str(settings), *clients, *self.control, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["run_id"]

    def runs(self, command, run, *options):
        """``cloister coordinator runs stop|resume|show`` with a SuperLink to speak to."""
        control = self.control if command in ("stop", "resume") else self.control[:2]
        return self.call("coordinator", "runs", command, run, *options, *control)

    def run_log(self, run):
        file = self.home / "runs" / run / "run.log"
        return file.read_text() if file.exists() else ""

    def state(self, run):
        try:
            return json.loads((self.home / "runs" / run / "state.json").read_text())
        except FileNotFoundError:
            return {"state": "submitted"}

    def metrics(self, run):
        file = self.home / "runs" / run / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, what, condition, limit_s):
        """Until ``condition`` holds; on the way out of patience it shows every log."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after {limit_s} s\n{self.logs()}"
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended with {process.poll()}\n{self.log(name)}"
            time.sleep(0.2)

    def wait_listening(self):
        from deploy.running.doctor import reach

        def answers():
            try:
                reach(self.address, self.authority)
            except Exception:
                return False
            return True

        self.wait("the coordinator answers", answers, 300)

    def start_all(self):
        """Coordinator, trainers and nodes, in an order in which nobody has to try twice."""
        self.start_coordinator()
        for name in self.names:
            self.start_trainer(name)
        self.wait_listening()
        for name in self.names:
            self.start_node(name)

    def wait_end(self, run, limit_s=900):
        self.wait("the run ends", lambda: self.state(run)["state"] in ("finished", "stopped", "failed"), limit_s)
        return self.state(run)

    def wait_round(self, run, number, limit_s=600):
        self.wait(f"round {number} is done", lambda: len(self.metrics(run)) > number, limit_s)

    def children(self, name, program):
        """Process ids of ``program`` below the process that was started as ``name``."""
        found, todo = [], [self.processes[name].pid]
        while todo:
            parent = todo.pop()
            for own in Path("/proc").glob("[0-9]*"):
                try:
                    stat = (own / "stat").read_text().rpartition(")")[2].split()
                    command = (own / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(stat[1]) == parent:
                    todo.append(int(own.name))
                    if program in command:
                        found.append(int(own.name))
        return found

    def kill(self, name):
        """``kill -9`` of a process that was started here, without what it started."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def logs(self):
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))

    def stop(self):
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
