"""The same federation with everything a real one has: an authority, kits, TLS, nginx's door, an accountant service."""

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from deploy.provisioning.provision import Federation, init
from deploy.running.doctor import free_port

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "provision"))
from door import NGINX, Proxy
from loopback import Loopback

RUN = """\
accountant = "grpcs://127.0.0.1:{port}"
accountant-certificate = "{side}/superexec/client.crt"
accountant-key = "{side}/superexec/client-tls.key"
accountant-authority = "{side}/superexec/ca.crt"
accountant-public-key = "{key}"
"""


class Secured(Loopback):
    """Organisations join by their kits through the door where nginx is installed, and at the SuperLink otherwise."""

    def __init__(self, folder, sockets, names=("east", "west"), *, ledger=None, run="", **options):
        self.accountant_port, self.door_port, self.proxy = free_port(), free_port(), None
        self.ledger_address = ledger
        super().__init__(folder, sockets, names, run=run, **options)
        own = RUN.format(port=self.accountant_port, side=self.side, key=self.public_key("accountant"))
        self.run_lines = own + self.run_lines

    def provision(self):
        """As docs/deployment.md says: init, one kit for each organisation, and the coordinator's folder from them."""
        door = self.door_port if NGINX else self.port
        init(self.folder / "federation", f"127.0.0.1:{door}", datetime.now(UTC))
        self.federation = Federation(self.folder / "federation")
        self.kits = {name: self.federation.add(name, datetime.now(UTC)) for name in self.names}
        (self.home / "keys").mkdir(parents=True)
        shutil.copy(self.side / "superexec" / "coordinator.key", self.home / "keys")
        (self.home / "clients").symlink_to(self.side / "superexec" / "clients")

    @property
    def side(self):
        """What provisioning made for the coordinator's services."""
        return self.folder / "federation" / "coordinator"

    def key_file(self, side):
        return self.side / ("accountant" if side == "accountant" else "superexec") / f"{side}.key"

    def trainer_lines(self, name):
        return f'key = "{self.kits[name]}/client.key"\n'

    @property
    def ledger(self):
        return self.ledger_address or self.folder / "ledger.sqlite"

    @property
    def authority(self):
        return self.side / "superexec" / "ca.crt"

    def tls(self, service):
        """Options with a service's own certificate."""
        files = {"certificate": "tls.crt", "key": "tls.key", "authority": "ca.crt"}
        return [part for name, file in files.items() for part in (f"--tls-{name}", str(self.side / service / file))]

    def start_accountant(self):
        own = self.side / "accountant"
        self.start(
            "accountant", "accountant", "serve", "--ledger", str(self.ledger), "--key", str(own / "accountant.key"),
            "--address", f"127.0.0.1:{self.accountant_port}", "--revoked", str(own / "revoked.json"),
            *self.tls("accountant"),
        )  # fmt: skip

    def start_coordinator(self):
        self.start_accountant()
        self.start(
            "coordinator", "coordinator", "serve", "--folder", str(self.home), "--host", "127.0.0.1", "--port",
            str(self.port), *self.tls("superlink"),
        )  # fmt: skip
        self.start(
            "nodes", "provision", "nodes", str(self.side / "nodes"), "--superlink", self.address,
            "--root-certificates", str(self.side / "nodes" / "ca.crt"), "--watch", "1",
        )  # fmt: skip
        if NGINX:
            (self.folder / "nginx").mkdir()
            self.proxy = Proxy(self.folder / "nginx", self.side, self.address, port=self.door_port)

    def start_node(self, name):
        self.start(
            f"{name}-node", "client", "join", "--kit", str(self.kits[name]), "--trainer",
            f"unix:{self.sockets}/{name}.sock",
        )  # fmt: skip

    def stop(self):
        super().stop()
        if self.proxy is not None:
            self.proxy.stop()
