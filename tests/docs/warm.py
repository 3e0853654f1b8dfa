"""The command ``cloister``, kept warm: its libraries are loaded once, and every call is a fork of that process.

Loading them takes eight CPU-seconds, and the pages hold dozens of commands. A call is the real program in a process
of its own, with its own arguments, folder, environment and exit code; only the loading is shared.

    python warm.py SOCKET     serves until its standard input is closed; prints a line when it is ready
"""

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

CALLER = """\
#!/bin/sh
exec {python} -S -E {file} "$@"
"""
CLIENT = """\
import json, os, socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect({socket!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(peer, [len(call).to_bytes(4, "big")], [0, 1, 2])
peer.sendall(call)
sys.exit(int(peer.recv(8) or b"70"))
"""


def install(folder: Path, address: Path) -> None:
    """Put a ``cloister`` into ``folder`` that calls the process behind ``address``."""
    (folder / "cloister.py").write_text(CLIENT.format(socket=str(address)))
    caller = folder / "cloister"
    caller.write_text(CALLER.format(python=sys.executable, file=folder / "cloister.py"))
    caller.chmod(0o755)


def serve(address: str) -> None:
    """Load everything, then fork for each call until standard input is closed."""
    import peft  # noqa: F401 - loaded for those who are forked
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        peer, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            answer(peer)
            os._exit(0)
        peer.close()


def answer(peer: socket.socket) -> None:
    """One call: run it in a child, end it if the caller goes away, and say its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(peer, 4, 3)
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size:
        body += peer.recv(size - len(body))
    child = os.fork()
    if child == 0:
        peer.close()
        run(*json.loads(body), files)
    for file in files:
        os.close(file)
    watch = os.pidfd_open(child)
    gone, _, _ = select.select([watch, peer], [], [])
    if watch not in gone:
        os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    if watch in gone:
        peer.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())


def run(arguments: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """Become the command; never returns."""
    from deploy.cli import main

    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["cloister", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
