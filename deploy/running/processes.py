"""Plain processes side by side: started in order, started again when one dies, stopped in reverse.

What a service manager or a container engine does with a restart policy, for people who run neither. Every child is
started without telemetry and without access to a model hub, and dies with its supervisor.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import Unavailable
from deploy.running.ending import Ending

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nothing calls home: not Flower, not Ray, not the model hub."""

FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_S = 0.5, 30.0, 60.0
STOP_S = 10.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Service:
    """One process to keep alive.

    Attributes:
        name: for messages.
        argv: program and arguments.
        environment: on top of this process's own and ``QUIET``.
        may_leave_work: what it has started is not killed with it (SuperExec's ServerApp notices, tells the SuperLink
            that its task is over, and ends by itself: its run can be resumed at once). Otherwise whatever it started
            ends with it: a relay left behind by a SuperNode could answer nobody.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    may_leave_work: bool = False


def program(name: str) -> str:
    """The full path of a command installed beside this Python.

    Raises:
        Unavailable: it is not there.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise Unavailable(f"{path}: not installed; install cloister into this environment again")
    return str(path)


def search_path() -> str:
    """``PATH`` with this environment's own commands first: Flower's programs start each other by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


class Supervisor:
    """Keeps services running until it is told to stop.

    Args:
        services: started in this order, stopped in the reverse one.
        say: gets one line whenever something is started or has ended.
        hear: gets (service, line) for every line that a service prints; None: they print where this process prints.
    """

    def __init__(
        self,
        services: Sequence[Service],
        say: Callable[[str], None] = lambda text: None,
        hear: Callable[[str, str], None] | None = None,
    ) -> None:
        self._services, self._say, self._hear = tuple(services), say, hear
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, float] = {}
        self._pause: dict[str, float] = {}
        self._ending: Ending | None = None

    def run(self) -> None:
        """Start everything and return after SIGTERM or SIGINT, when everything has ended."""
        ending = self._ending = Ending()
        try:
            for service in self._services:
                self._start(service)
            while not ending.wait(0.2):
                for service in self._services:
                    self._revive(service)
        finally:
            self._stop()

    def _start(self, service: Service) -> None:
        environment = {**os.environ, "PATH": search_path(), **QUIET, **service.environment}
        into = None if self._hear is None else subprocess.PIPE
        process = subprocess.Popen(  # noqa: S603
            list(service.argv), env=environment, start_new_session=True, preexec_fn=_die_with_parent, stdout=into,
            stderr=None if into is None else subprocess.STDOUT,
        )  # fmt: skip
        if self._hear is not None:
            threading.Thread(target=_listen, args=(process, service.name, self._hear), daemon=True).start()
        self._running[service.name], self._started[service.name] = process, time.monotonic()
        self._say(f"{service.name} started (process {process.pid})")

    def _revive(self, service: Service) -> None:
        process = self._running[service.name]
        if not _has_ended(process):
            return
        if not service.may_leave_work:
            _kill_group(process)
        code = process.wait()
        lived = time.monotonic() - self._started[service.name]
        pause = FIRST_PAUSE_S if lived > STEADY_S else self._pause.get(service.name, FIRST_PAUSE_S)
        self._pause[service.name] = min(2 * pause, LONGEST_PAUSE_S)
        self._say(f"{service.name} ended ({_ending(code)}) and is started again in {pause:g} s")
        if self._ending is None or not self._ending.wait(pause):
            self._start(service)

    def _stop(self) -> None:
        for service in reversed(self._services):
            process = self._running.get(service.name)
            if process is None or process.returncode is not None:
                continue
            process.terminate()
            deadline = time.monotonic() + STOP_S
            while not _has_ended(process) and time.monotonic() < deadline:
                time.sleep(0.05)
            _kill_group(process)
        for process in self._running.values():
            process.wait()


def _listen(process: subprocess.Popen[bytes], name: str, hear: Callable[[str, str], None]) -> None:
    """Every line until the process and those it started have closed their output; a full pipe would stop them."""
    if process.stdout is not None:
        with process.stdout as lines:
            for line in lines:
                hear(name, line.decode("utf-8", errors="replace"))


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without reaping it: until then its number, which is that of its group, cannot be another's."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it started; each was given a session of its own. It must not have been reaped."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def _die_with_parent() -> None:
    """Runs in the child: a killed supervisor leaves nobody behind that holds a port."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
