"""``deploy/provisioning/provision.py``: what is made, who may read it, and that nothing is half made or made twice."""

import json
import os
import stat
import tarfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from flwr.cli.supernode.register import try_load_public_key
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import deploy.provisioning.kits
import deploy.provisioning.provision
from common.errors import InvalidInput, Refused, Unavailable
from common.signing import SigningKey, verify
from deploy.cli import app
from deploy.provisioning.certificates import signing_request
from deploy.provisioning.private_files import write_private
from deploy.provisioning.provision import Federation, init, request_keys, split_address
from server.revocation import read_revoked

KIT = {
    "ca.crt",
    "supernode.key",
    "supernode.pub",
    "client.key",
    "client.pub",
    "client.crt",
    "client-tls.key",
    "coordinator.pub",
    "accountant.pub",
    "kit.json",
    "README.md",
}
PRIVATE = {"supernode.key", "client.key", "client-tls.key"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def modes_below(folder: Path) -> dict[str, set[int]]:
    found = {"file": set(), "folder": set()}
    for path in [folder, *folder.rglob("*")]:
        found["folder" if path.is_dir() else "file"].add(stat.S_IMODE(path.stat().st_mode))
    return found


def subject(pem: bytes) -> tuple[str, str]:
    name = x509.load_pem_x509_certificate(pem).subject
    unit = name.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)[0].value
    return unit, name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value


def test_a_kit_has_everything_and_only_its_owner_may_read_it(federation, now):
    kit = federation.add("clinic-a", now)
    assert names_in(kit) == KIT
    assert json.loads((kit / "kit.json").read_text()) == {
        "name": "clinic-a",
        "coordinator": "127.0.0.1:8443",
        "version": "0.1.0",
    }
    old = os.umask(0)
    try:
        federation.add("clinic-b", now)
    finally:
        os.umask(old)
    assert modes_below(federation.folder) == {"file": {0o600}, "folder": {0o700}}


def test_the_tar_holds_the_folder(federation, now, tmp_path):
    kit = federation.add("clinic-a", now)
    with tarfile.open(f"{kit}.tar") as archive:
        assert {item.mode for item in archive if item.isfile()} == {0o600}
        archive.extractall(tmp_path / "there", filter="data")
    arrived = tmp_path / "there" / "clinic-a"
    assert {path.name: path.read_bytes() for path in arrived.iterdir()} == {
        path.name: path.read_bytes() for path in kit.iterdir()
    }


def test_the_keys_of_a_kit_belong_together(federation, now):
    kit = federation.add("clinic-a", now)
    signing = SigningKey.load(kit / "client.key")
    verify((kit / "client.pub").read_text().strip(), "head", {"head": "x"}, signing.sign("head", {"head": "x"}))
    node = load_ssh_private_key((kit / "supernode.key").read_bytes(), None)
    assert isinstance(node.curve, ec.SECP384R1)
    # Flower's own reader is the witness for the public half.
    assert try_load_public_key(kit / "supernode.pub") == node.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    side = federation.folder / "coordinator"
    for name, service in (("coordinator", "superexec"), ("accountant", "accountant")):
        assert SigningKey.load(side / service / f"{name}.key").public_key == (kit / f"{name}.pub").read_text().strip()


@pytest.mark.parametrize("service", ["proxy", "superlink", "accountant"])
def test_server_certificates_verify_for_their_names_and_no_others(federation, now, service):
    side = federation.folder / "coordinator" / service
    store = Store(x509.load_pem_x509_certificates((side / "ca.crt").read_bytes()))
    leaf = x509.load_pem_x509_certificate((side / "tls.crt").read_bytes())
    verifier = PolicyBuilder().store(store).time(now)
    verifier.build_server_verifier(x509.DNSName(service)).verify(leaf, [])
    with pytest.raises(x509.verification.VerificationError):
        verifier.build_server_verifier(x509.DNSName("elsewhere.example.org")).verify(leaf, [])
    late = PolicyBuilder().store(store).time(now + timedelta(days=731))
    with pytest.raises(x509.verification.VerificationError):
        late.build_server_verifier(x509.DNSName(service)).verify(leaf, [])


def test_the_authority_signs_leaves_only_and_parties_are_no_servers(federation, now):
    kit = federation.add("clinic-a", now)
    authority = x509.load_pem_x509_certificate((kit / "ca.crt").read_bytes())
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    leaf = x509.load_pem_x509_certificate((kit / "client.crt").read_bytes())
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert subject((kit / "client.crt").read_bytes()) == ("client", "clinic-a")
    own = (federation.folder / "coordinator" / "superexec" / "client.crt").read_bytes()
    assert subject(own) == ("coordinator", "coordinator")


def test_no_service_of_the_coordinator_holds_a_secret_that_it_does_not_use(federation, now):
    federation.add("clinic-a", now)
    side = federation.folder / "coordinator"
    secret = {path.relative_to(side).as_posix() for path in side.rglob("*") if path.suffix in (".key", ".secret")}
    assert secret == {
        "proxy/tls.key",
        "superlink/tls.key",
        "superlink/superexec.secret",
        "superexec/superexec.secret",
        "superexec/coordinator.key",
        "superexec/client-tls.key",
        "accountant/tls.key",
        "accountant/accountant.key",
    }


def test_private_keys_can_stay_with_the_organisation(federation, now, tmp_path):
    request_keys(tmp_path / "own", "clinic-a")
    assert names_in(tmp_path / "own" / "public") == {"supernode.pub", "client.pub", "client-tls.csr"}
    kit = federation.add("clinic-a", now, public_keys=tmp_path / "own" / "public")
    assert names_in(kit) == KIT - PRIVATE
    known = b"".join(path.read_bytes() for path in federation.folder.rglob("*") if path.is_file())
    for name in PRIVATE:
        lines = (tmp_path / "own" / "private" / name).read_bytes().splitlines()
        secret = lines[0] if len(lines) == 1 else lines[-2]  # the last line of a PEM body is private in both formats
        assert secret not in known
    leaf = x509.load_pem_x509_certificate((kit / "client.crt").read_bytes())
    request = x509.load_pem_x509_csr((tmp_path / "own" / "public" / "client-tls.csr").read_bytes())
    assert leaf.public_key() == request.public_key()


def test_a_request_cannot_choose_its_name(federation, now, tmp_path):
    request_keys(tmp_path / "own", "coordinator")
    kit = federation.add("clinic-a", now, public_keys=tmp_path / "own" / "public")
    assert subject((kit / "client.crt").read_bytes()) == ("client", "clinic-a")


def _broken(public: Path, case: str) -> None:
    if case == "private key sent":
        (public / "client.key").write_text("AAAA")
    elif case == "missing":
        (public / "client.pub").unlink()
    elif case == "wrong curve":
        key = ed25519.Ed25519PrivateKey.generate().public_key()
        (public / "supernode.pub").write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    elif case == "no key":
        (public / "supernode.pub").write_text("ecdsa-sha2-nistp384 nonsense")
    elif case == "short":
        (public / "client.pub").write_text("AAAA")
    elif case == "large":
        (public / "client.pub").write_bytes(b"A" * 2**20)
    elif case == "other signature":
        _, other = signing_request("x")
        mine = bytearray(x509.load_pem_x509_csr(other).public_bytes(Encoding.DER))
        mine[-1] ^= 1
        (public / "client-tls.csr").write_bytes(x509.load_der_x509_csr(bytes(mine)).public_bytes(Encoding.PEM))
    else:
        (public / "client-tls.csr").write_text("-----BEGIN NOTHING-----")


@pytest.mark.parametrize(
    "case",
    ["private key sent", "missing", "wrong curve", "no key", "short", "large", "other signature", "no request"],
)
def test_keys_that_cannot_be_used_are_refused_and_leave_nothing(federation, now, tmp_path, case):
    request_keys(tmp_path / "own", "clinic-a")
    _broken(tmp_path / "own" / "public", case)
    before = set(federation.folder.rglob("*"))
    with pytest.raises(InvalidInput):
        federation.add("clinic-a", now, public_keys=tmp_path / "own" / "public")
    assert set(federation.folder.rglob("*")) == before


def test_a_key_is_given_to_one_member_only(federation, now, tmp_path):
    request_keys(tmp_path / "own", "clinic-a")
    federation.add("clinic-a", now, public_keys=tmp_path / "own" / "public")
    with pytest.raises(Refused, match=r"clinic-a\.1"):
        federation.add("clinic-b", now, public_keys=tmp_path / "own" / "public")
    with pytest.raises(Refused):
        federation.rotate("clinic-a", now, public_keys=tmp_path / "own" / "public")
    assert [member.label for member in federation.members()] == ["clinic-a.1"]


def test_nothing_is_overwritten(federation, now, tmp_path):
    kit = federation.add("clinic-a", now)
    key = (kit / "client.key").read_bytes()
    with pytest.raises(InvalidInput, match="rotate"):
        federation.add("clinic-a", now)
    with pytest.raises(InvalidInput, match="exists"):
        init(federation.folder, "127.0.0.1:1", now)
    with pytest.raises(InvalidInput, match="exists"):
        write_private(kit / "client.key", b"other")
    request_keys(tmp_path / "own", "a")
    with pytest.raises(InvalidInput, match="exists"):
        request_keys(tmp_path / "own", "a")
    assert (kit / "client.key").read_bytes() == key


def test_a_failure_at_any_write_leaves_no_kit_and_the_next_try_succeeds(federation, now, monkeypatch):
    """The n-th write fails, for every n: afterwards there is a whole kit, or none and no member either."""
    real, left = deploy.provisioning.provision.write_private, [0]

    def failing(path, data):
        left[0] -= 1
        if left[0] == 0:
            raise Unavailable(f"{path}: the disk is full")
        real(path, data)

    for module in (deploy.provisioning.provision, deploy.provisioning.kits):
        monkeypatch.setattr(module, "write_private", failing)
    failures = 0
    for nth in range(1, 100):
        left[0], name = nth, f"clinic-{nth}"
        try:
            kit = federation.add(name, now)
        except Unavailable:
            failures += 1
            assert not list((federation.folder / "kits").glob(f"*{name}*"))
            assert not list((federation.folder / "members").glob(f"*{name}*"))
            left[0] = 0
            kit = federation.add(name, now)
            assert names_in(kit) == KIT
            continue
        assert names_in(kit) == KIT
        break
    assert failures > 10
    assert nth == failures + 1


def test_rotation_revokes_what_was_before(federation, now):
    first = federation.add("clinic-a", now)
    second = federation.rotate("clinic-a", now)
    assert names_in(second) == KIT
    for name in PRIVATE:
        assert (first / name).read_bytes() != (second / name).read_bytes()
    assert [(member.label, member.revoked) for member in federation.members()] == [
        ("clinic-a.1", True),
        ("clinic-a.2", False),
    ]
    kept = federation.rotate("clinic-a", now, keep_old=True)
    assert kept.name == "clinic-a.3"
    assert [member.revoked for member in federation.members()] == [True, False, False]
    federation.revoke("clinic-a", generation=2)
    assert [member.revoked for member in federation.members()] == [True, True, False]


def test_revocation_strikes_a_member_off_every_list_and_may_be_repeated(federation, now):
    federation.add("clinic-a", now)
    federation.add("clinic-b", now)
    side = federation.folder / "coordinator"
    for _ in range(2):
        federation.revoke("clinic-a")
        assert names_in(side / "nodes") == {"ca.crt", "clinic-b.1.pub", "revoked"}
        assert names_in(side / "nodes" / "revoked") == {"clinic-a.1.pub"}
        assert names_in(side / "superexec" / "clients") == {"clinic-b.1.pub"}
        assert list(read_revoked(side / "accountant" / "revoked.json").values()) == ["clinic-a.1"]
    with pytest.raises(InvalidInput, match="known: clinic-a, clinic-b"):
        federation.revoke("clinic-c")
    with pytest.raises(InvalidInput, match="generation 7"):
        federation.revoke("clinic-a", generation=7)


def test_revocations_at_the_same_time_are_all_kept(federation, now):
    names = [f"clinic-{number}" for number in range(8)]
    for name in names:
        federation.add(name, now)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Federation(federation.folder).revoke, names))
    assert all(member.revoked for member in federation.members())


def test_new_server_certificates_keep_authority_and_names(federation, now):
    side = federation.folder / "coordinator"
    before = {path: path.read_bytes() for path in side.rglob("*") if path.suffix in (".crt", ".key", ".secret")}
    federation.rotate_servers(now)
    changed = {path.relative_to(side).as_posix() for path, data in before.items() if path.read_bytes() != data}
    assert changed == {
        *(f"{service}/tls.{end}" for service in ("proxy", "superlink", "accountant") for end in ("crt", "key")),
        "superexec/client.crt",
        "superexec/client-tls.key",
    }
    assert list(read_revoked(side / "accountant" / "revoked.json").values()) == ["coordinator"]
    assert modes_below(federation.folder) == {"file": {0o600}, "folder": {0o700}}


def test_an_auditor_gets_no_key_that_it_cannot_use(federation, now):
    kit = federation.add("court", now, role="auditor")
    assert names_in(kit) == KIT - {"supernode.key", "supernode.pub", "client.key", "client.pub"}
    assert subject((kit / "client.crt").read_bytes()) == ("auditor", "court")
    assert not list((federation.folder / "coordinator" / "nodes").glob("*.pub"))
    assert federation.rotate("court", now).name == "court.2"
    with pytest.raises(InvalidInput, match="role"):
        federation.add("x", now, role="coordinator")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes for others")
def test_what_root_replaces_can_still_be_read_by_the_containers_user(federation, now):
    side = federation.folder / "coordinator"
    for path in [side, *side.rglob("*")]:
        os.chown(path, 10001, 10001)
    federation.add("clinic-a", now)
    federation.revoke("clinic-a")
    federation.rotate_servers(now)
    assert {path.stat().st_uid for path in side.rglob("*")} == {10001}


def test_certificates_never_outlive_their_authority(federation, now):
    kit = federation.add("clinic-a", now, days=3650)
    leaf = x509.load_pem_x509_certificate((kit / "client.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((kit / "ca.crt").read_bytes())
    assert leaf.not_valid_after_utc <= authority.not_valid_after_utc
    with pytest.raises(InvalidInput, match="expired"):
        federation.add("clinic-b", now + timedelta(days=4000))


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a/b", "..", "a.2", "a" * 64, "é", "a\n"])
def test_names_that_are_no_names_are_refused(federation, now, name):
    with pytest.raises(InvalidInput):
        federation.add(name, now)


@given(st.text(max_size=40))
def test_an_address_is_read_whole_or_refused(text):
    try:
        host, port = split_address(text)
    except InvalidInput:
        return
    assert 0 < port < 65536
    assert host
    assert not set(host) & set(" /\n\0\"'")


@pytest.mark.parametrize(
    "address", ["host", "host:", ":1", "host:0", "host:65536", "a b:1", "http://host:1", "host:1/x"]
)
def test_what_is_no_address_is_refused(tmp_path, now, address):
    with pytest.raises(InvalidInput):
        init(tmp_path / "f", address, now)
    assert not (tmp_path / "f").exists()


def test_the_commands_in_their_order(tmp_path):
    runner, folder = CliRunner(), str(tmp_path / "f")

    def run(*arguments, code=0):
        result = runner.invoke(app, ["provision", *arguments])
        assert result.exit_code == code, result.output
        return result.output

    assert "public key" in run("init", folder, "--coordinator", "c.example.org:8443", "--also-known-as", "10.0.0.7")
    assert "delete it here" in run("add-client", "clinic-a", "--federation", folder)
    run("request", "clinic-b", "--output", str(tmp_path / "own"))
    out = run("add-client", "clinic-b", "--federation", folder, "--public-keys", str(tmp_path / "own" / "public"))
    assert "private keys" not in out
    said = run("database", "--federation", folder).splitlines()
    assert said == run("database", "--federation", folder).splitlines()
    assert [line.rpartition("/")[2] for line in said] == [
        "writer.password: the accountant's",
        "reader.password: the dashboard's",
    ]
    run("rotate", "clinic-a", "--federation", folder, "--keep-old")
    assert "restart" in run("rotate", "--servers", "--federation", folder)
    run("rotate", "--federation", folder, code=2)
    assert run("revoke", "clinic-a", "--federation", folder).splitlines() == [
        "clinic-a.1: revoked",
        "clinic-a.2: revoked",
    ]
    listed = json.loads(run("list", "--federation", folder, "--json"))
    assert [(item["name"], item["generation"], item["revoked"]) for item in listed] == [
        ("clinic-a", 1, True),
        ("clinic-a", 2, True),
        ("clinic-b", 1, False),
    ]
    assert "until" in run("list", "--federation", folder)
    assert isinstance(runner.invoke(app, ["provision", "list", "--federation", str(tmp_path)]).exception, InvalidInput)
