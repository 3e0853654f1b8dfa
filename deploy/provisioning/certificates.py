"""X.509 of a federation: one authority of its own, certificates of its servers, certificates of its parties.

A party's certificate says who it is to the accountant: OU is the role, CN the name (``server/accountant_service.py``).
Keys are ECDSA on P-256, which every TLS 1.2 and 1.3 library takes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import InvalidInput

AUTHORITY_DAYS = 3650
LEAF_DAYS = 730
_BACKDATED = timedelta(minutes=5)  # a party whose clock is a little behind can use it at once

Hosts = Sequence[str]


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs the certificates of one federation."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key

    @classmethod
    def create(cls, name: str, now: datetime) -> Authority:
        """A new authority; it can sign leaf certificates only."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name, "authority")
        builder = _builder(subject, subject, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, pair: Pair) -> Authority:
        """From what ``pair`` gave.

        Raises:
            InvalidInput: no certificate, no key, or not of each other.
        """
        try:
            certificate = x509.load_pem_x509_certificate(pair.certificate)
            key = load_pem_private_key(pair.key, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidInput(f"the certificate authority cannot be read ({error})") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise InvalidInput("the certificate authority's key does not belong to its certificate")
        return cls(certificate, key)

    @property
    def pair(self) -> Pair:
        """The authority's own certificate and key."""
        return Pair(self._certificate.public_bytes(Encoding.PEM), _pem(self._key))

    def server(self, name: str, hosts: Hosts, now: datetime, *, days: int = LEAF_DAYS) -> Pair:
        """A certificate for a server reached under ``hosts`` (names or addresses), and a fresh key.

        It may also be shown as a client's, so that the server can ask itself whether it is well; its role is none
        that the accountant knows.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        purposes = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        builder = self._leaf(_name(name, "service"), key.public_key(), purposes, now, days)
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return Pair(self._signed(builder.add_extension(names, critical=False)), _pem(key))

    def party(self, name: str, role: str, now: datetime, *, days: int = LEAF_DAYS) -> Pair:
        """A client certificate for a role and a name, and a fresh key."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Pair(self._party(name, role, key.public_key(), now, days), _pem(key))

    def party_of_request(self, request: bytes, name: str, role: str, now: datetime, *, days: int = LEAF_DAYS) -> bytes:
        """A client certificate for the key of a signing request; whatever name the request asks for is ignored.

        Raises:
            InvalidInput: the request is unreadable, not signed by its own key, or of another kind of key.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            key, is_its_own = asked.public_key(), asked.is_signature_valid
        except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
            raise InvalidInput(f"the certificate request cannot be read ({error})") from error
        if not is_its_own:
            raise InvalidInput("the certificate request is not signed by the key in it")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise InvalidInput("the certificate request's key must be ECDSA on P-256 ('cloister provision request')")
        return self._party(name, role, key, now, days)

    def _party(self, name: str, role: str, key: ec.EllipticCurvePublicKey, now: datetime, days: int) -> bytes:
        return self._signed(self._leaf(_name(name, role), key, (ExtendedKeyUsageOID.CLIENT_AUTH,), now, days))

    def _leaf(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        purposes: Sequence[x509.ObjectIdentifier],
        now: datetime,
        days: int,
    ) -> x509.CertificateBuilder:
        end = min(now + timedelta(days=days), self._certificate.not_valid_after_utc)
        if end <= now:
            raise InvalidInput("the certificate authority has expired: start a new federation folder")
        builder = _builder(subject, self._certificate.subject, key, now, end)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(list(purposes)), critical=False)
            .add_extension(issuer, critical=False)
        )

    def _signed(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def signing_request(name: str) -> tuple[bytes, bytes]:
    """A fresh private key and a request for a certificate over it, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(name, "client")).sign(key, hashes.SHA256())
    return _pem(key), request.public_bytes(Encoding.PEM)


def serial_of(certificate: bytes) -> str:
    """The serial number of a PEM certificate, in hexadecimal."""
    return f"{x509.load_pem_x509_certificate(certificate).serial_number:x}"


def expiry_of(certificate: bytes) -> datetime:
    """When a PEM certificate ends."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common_name: str, unit: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister federation"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(**given: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: given.get(name, False) for name in names})


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
