"""The dashboard behind the deployment's own nginx: who asks is who the certificate names, whatever else is sent."""

import http.client
import os
import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from made_runs import until

from common.pages.serving import listen_unix, server
from deploy.provisioning.certificates import Authority, Pair
from deploy.provisioning.provision import Federation, init
from server.dashboard.app import PAGES, Dashboard
from server.dashboard.doors import SERIAL, SUBJECT, VERIFIED, ByCertificate
from server.dashboard.watch import Watch
from server.revocation import RevocationList

DEPLOY = Path(__file__).parents[2] / "deploy" / "coordinator"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")

RUN_A, RUN_B = "a" * 16, "b" * 16
FORGED = (
    (VERIFIED, "SUCCESS"),
    (SUBJECT, "CN=anna,OU=auditor,O=Cloister federation"),
    (SERIAL, "01"),
    ("X_Cloister_Subject", "CN=anna,OU=auditor,O=Cloister federation"),
    ("X-Cloister-Subject ", "CN=anna,OU=auditor,O=Cloister federation"),
    ("Authorization", "Bearer " + "t" * 43),
    ("Cookie", "cloister-session=99999999999." + "0" * 64),
)


def filled(path: str) -> str:
    return path.replace("{run}", RUN_A).replace("{round}", "1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def federation(tmp_path):
    init(tmp_path / "federation", "127.0.0.1:8443", datetime.now(UTC))
    made = Federation(tmp_path / "federation")
    for name in ("clinic-a", "clinic-b"):
        made.add(name, datetime.now(UTC))
    made.add("anna", datetime.now(UTC), role="auditor")
    return made


class Door:
    """nginx with the dashboard's own configuration; only its addresses and files are put elsewhere."""

    def __init__(self, folder: Path, federation: Federation, dashboard: Path) -> None:
        self.port, self._federation = free_port(), federation
        side = federation.folder / "coordinator" / "proxy"
        text = (DEPLOY / "nginx-dashboard.conf").read_text()
        for there, here in (
            ("listen 8444 ssl", f"listen 127.0.0.1:{self.port} ssl"),
            ("/etc/cloister/proxy", str(side)),
            ("/run/cloister/dashboard.sock", str(dashboard)),
        ):
            assert there in text, there
            text = text.replace(there, here)
        (folder / "dashboard.conf").write_text(text)
        outer = (DEPLOY / "nginx.conf").read_text()
        begin, end = outer.index("    server {\n        listen 8443"), outer.rindex("    include /etc/nginx/cloister/")
        outer = outer[:begin] + outer[end : outer.index("    # For the container engine's health check")] + "}\n"
        for there, here in (
            (" /tmp/", f" {folder}/"),
            ("/etc/nginx/cloister/*.conf", str(folder / "dashboard.conf")),
            ("resolver 127.0.0.11 valid=5s ipv6=off;", ""),
            ("/dev/stderr", f"{folder}/error.log"),
        ):
            assert there in outer, there
            outer = outer.replace(there, here)
        if os.geteuid() == 0:
            outer = "user root;\n" + outer
        (folder / "nginx.conf").write_text(outer)
        command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
        self._process = subprocess.Popen(command)
        until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, "nginx has ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def ask(self, path: str, kit: str | None, *headers: tuple[str, str], method: str = "GET", pair: Pair | None = None):
        """Status, body and headers of an answer; ``kit`` is whose certificate is shown."""
        context = ssl.create_default_context(cafile=str(self._federation.folder / "kits" / "clinic-a" / "ca.crt"))
        if kit is not None:
            folder = self._federation.folder / "kits" / kit
            context.load_cert_chain(folder / "client.crt", folder / "client-tls.key")
        if pair is not None:
            file = self._federation.folder / "pair.pem"
            file.write_bytes(pair.certificate + pair.key)
            context.load_cert_chain(file)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)
        connection.putrequest(method, path)
        for name, value in headers:
            connection.putheader(name, value)
        connection.putheader("Accept", "text/html")
        connection.endheaders()
        answer = connection.getresponse()
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            body = answer.read1(4096) + answer.read1(4096)
        else:
            body = answer.read()
        connection.close()
        return answer.status, body.decode(), answer.headers

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)


@pytest.fixture
def door(two_runs, coordinator, federation, tmp_path):
    path = tmp_path / "s" / "dashboard.sock"
    path.parent.mkdir(mode=0o700)
    watch = Watch(coordinator.home)
    watch.start()
    revoked = RevocationList(federation.folder / "coordinator" / "dashboard" / "revoked.json")
    running = server(Dashboard(watch, ByCertificate(revoked)).app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listen_unix(path)]})
    thread.start()
    (tmp_path / "nginx").mkdir()
    opened = Door(tmp_path / "nginx", federation, path)
    until(lambda: watch.is_ready and watch.certificates)
    yield opened
    opened.stop()
    running.should_exit = True
    thread.join(timeout=30)
    watch.stop()


def test_a_kit_opens_its_own_pages_and_an_auditors_all(door):
    status, page, _ = door.ask(f"/runs/{RUN_A}", "clinic-a")
    assert (status, "clinic-c" in page) == (200, False)
    assert door.ask(f"/runs/{RUN_A}", "clinic-b")[0] == 404
    status, page, _ = door.ask(f"/runs/{RUN_A}", "anna")
    assert (status, "clinic-c" in page) == (200, True)
    status, words, _ = door.ask(f"/runs/{RUN_A}/events", "anna")
    assert status == 200
    assert "retry: 1000" in words  # passed on at once, not kept until the stream ends


def test_without_a_certificate_the_page_says_what_is_missing(door):
    for page in PAGES:
        if page.rule != "anybody":
            status, said, _ = door.ask(filled(page.path), None)
            assert status == 401, page.path
            assert "needs a certificate of a kit" in said


@pytest.mark.parametrize("kit", [None, "clinic-b"])
def test_headers_that_a_caller_makes_up_change_nothing(door, kit):
    paths = [page.path for page in PAGES if "events" not in page.path]
    expected = {path: door.ask(filled(path), kit)[0] for path in paths}
    for headers in [FORGED, *[(one,) for one in FORGED], FORGED[:3] * 2]:
        for path, status in expected.items():
            found, said, _ = door.ask(filled(path), kit, *headers)
            # 400: nginx does not take such a header at all.
            assert found in (status, 400), (path, headers)
            assert "clinic-a" not in said
            assert "clinic-c" not in said


def test_a_service_certificate_or_one_of_another_authority_is_nobodys(door, federation, tmp_path):
    side = federation.folder / "coordinator"
    service = Pair((side / "superlink" / "tls.crt").read_bytes(), (side / "superlink" / "tls.key").read_bytes())
    assert door.ask("/", None, pair=service)[0] == 401
    stranger = Authority.create("elsewhere", datetime.now(UTC)).party("anna", "auditor", datetime.now(UTC))
    status, said, _ = door.ask("/", None, pair=stranger)
    assert status == 400
    assert "clinic" not in said


def test_a_revoked_kit_is_out_at_its_next_request(door, federation):
    assert door.ask("/", "clinic-a")[0] == 200
    federation.revoke("clinic-a")
    assert door.ask("/", "clinic-a")[0] == 401
    assert door.ask("/", "clinic-b")[0] == 200


def test_nothing_can_be_sent_and_the_answer_is_strict(door):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert door.ask("/login", "anna", method=method)[0] in (405, 411)
    headers = door.ask("/", "anna")[2]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["strict-transport-security"]


def test_a_dashboard_that_is_down_has_a_page_that_says_so(federation, tmp_path):
    (tmp_path / "nginx").mkdir()
    door = Door(tmp_path / "nginx", federation, tmp_path / "nobody.sock")
    try:
        status, said, _ = door.ask("/", "anna")
        assert status == 503
        assert "The dashboard is not running" in said
    finally:
        door.stop()
