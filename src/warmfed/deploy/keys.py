"""Certificates and node keys. No other module imports the library `cryptography`.

All keys are on the curve P-384, as Flower requires. Certificates are X.509; a node's key pair is in OpenSSH's format.
"""

import base64
import ipaddress
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..utils.errors import InputError
from ..utils.files import read_bytes
from ..utils.paths import matching

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError as error:
    raise InputError("certificates need the package cryptography; install warmfed with it: warmfed[flower]") from error

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Pattern of a site's name."""
AUTHORITY = timedelta(days=3650)
"""Validity of a project's authority."""
SERVER = timedelta(days=825)
"""Validity of the server's certificate; `warmfed deploy renew` writes a new one."""
_EARLY = timedelta(hours=1)  # so that a site with a slow clock accepts a new certificate
_NEW = "get a new site folder from the coordinator"
_PEM, _OPEN = serialization.Encoding.PEM, serialization.NoEncryption()


def authority(name: str, now: datetime) -> tuple[bytes, bytes]:
    """Return (certificate, private key) of a new certificate authority, both in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _named(name)
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = _certificate(subject, subject, key, key, now, AUTHORITY, path=0)
    return made.add_extension(usage, critical=True).sign(key, hashes.SHA384()).public_bytes(_PEM), _private(key)


def server(ca: bytes, ca_key: bytes, host: str, now: datetime) -> tuple[bytes, bytes]:
    """Return (certificate, private key) of the server in PEM, for `host`, a name or an address, and for localhost."""
    issuer, signer = _read(ca, "the authority's certificate"), serialization.load_pem_private_key(ca_key, None)
    key = ec.generate_private_key(ec.SECP384R1())
    names = dict.fromkeys([host, "localhost", "127.0.0.1"])
    made = _certificate(_named(host), issuer.subject, key, signer, now, SERVER, path=None)
    made = made.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
    made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return made.sign(signer, hashes.SHA384()).public_bytes(_PEM), _private(key)


def node() -> tuple[bytes, bytes]:
    """Return (private key, public key) of a new SuperNode, in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, _OPEN), _public(key) + b"\n"


def dates(certificate: bytes, what: str, now: datetime, remedy: str) -> str:
    """Return the end of a certificate's validity, as text.

    Args:
        certificate: the certificate in PEM.
        what: name of the certificate in the error.
        now: the current time.
        remedy: end of the error's text: how to fix it.

    Raises:
        InputError: The certificate is not valid now.
    """
    found = _read(certificate, what)
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    if now < begins:
        raise InputError(f"{what} is valid from {begins:%Y-%m-%d %H:%M} UTC, it is {now:%Y-%m-%d %H:%M}; set this clock right")
    if now > ends:
        raise InputError(f"{what} has expired on {ends:%Y-%m-%d}; {remedy}")
    return f"valid until {ends:%Y-%m-%d} ({(ends - now).days} days)"


def chain(certificate: bytes, key: bytes, ca: bytes, host: str, remedy: str) -> str:
    """Return the names in the server's certificate; raise `InputError` if key, authority or host do not match it."""
    found, issuer = _read(certificate, "the server's certificate"), _read(ca, "the authority's certificate")
    try:
        found.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InputError(f"the server's certificate is not signed by the authority in ca.crt; {remedy}") from error
    if _key(key, "the server's key", serialization.load_pem_private_key).public_key() != found.public_key():
        raise InputError(f"the server's key is not that of its certificate; {remedy}")
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if _general(host) not in list(names):
        raise InputError(f"the server's certificate is not for {host}; {remedy}")
    return ", ".join(str(name.value) for name in names)


def pair(private: bytes, public: bytes) -> str:
    """Return the kind of a node's key; raise `InputError` if it is not a P-384 key or the public key does not match."""
    key = _key(private, "the node's private key", serialization.load_ssh_private_key)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise InputError(f"the node's key is not on the curve P-384, which Flower requires; {_NEW}")
    if public.split()[:2] != _public(key).split()[:2]:
        raise InputError(f"node.pub is not the public key of node; {_NEW}")
    return "EC P-384"


def registered(folder: Path) -> dict[bytes, str]:
    """Return the names of the sites with a public key NAME.pub in a folder, by key ("ecdsa-sha2-nistp384 AAAA…").

    Raises:
        InputError: A file is not a public key, two names have one key, or a name is not valid for a site.
    """
    found: dict[bytes, str] = {}
    for path in matching(folder, "*.pub"):
        if not NAME.fullmatch(path.stem):  # the name becomes part of paths
            raise InputError(f"{path}: a site's name must have at most 64 letters, digits, - and _; rename the file")
        key = b" ".join(read_bytes(path, f"the public key of site {path.stem!r}").split()[:2])
        _key(key, f"the public key {path}", lambda data, _: serialization.load_ssh_public_key(data))
        if key in found:
            raise InputError(f"{path} is the key of site {found[key]!r}; each site has its own: warmfed deploy add-site")
        found[key] = path.stem
    return found


def openssh(pem: bytes) -> bytes:
    """Return a PEM public key in the format of `registered`; empty if it is not a key."""
    try:
        return _public_line(serialization.load_pem_public_key(pem))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return b""


def pem(public: bytes) -> bytes:
    """Return a public key of `registered` in PEM, the format of Flower."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(serialization.load_ssh_public_key(public).public_bytes(_PEM, form))


def signed(folder: Path, key: bytes, content: bytes, signature: bytes) -> bool:
    """Return whether `key` is registered in `folder` and has signed `content`; key (PEM) and signature are in base64."""
    try:
        public = serialization.load_pem_public_key(base64.b64decode(key, validate=True))
        if _public_line(public) not in registered(folder) or not isinstance(public, ec.EllipticCurvePublicKey):
            return False
        public.verify(base64.b64decode(signature, validate=True), content, ec.ECDSA(hashes.SHA256()))
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def signature_of_a_new_key() -> tuple[str, str, str]:
    """Return the headers of an unregistered SuperNode: public key, time stamp, and its signature; in base64."""
    key, stamp = ec.generate_private_key(ec.SECP384R1()), now().isoformat()
    public = key.public_key().public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return base64.b64encode(public).decode(), stamp, base64.b64encode(signature).decode()


def _certificate(subject: Any, issuer: Any, key: Any, signer: Any, now: datetime, valid: timedelta, path: int | None) -> Any:
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - _EARLY).not_valid_after(now + valid)
    made = made.add_extension(x509.BasicConstraints(ca=path is not None, path_length=path), critical=True)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)


def _named(name: str) -> Any:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general(host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: Any) -> bytes:
    return bytes(key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _OPEN))


def _public(key: Any) -> bytes:
    return _public_line(key.public_key())


def _public_line(public: Any) -> bytes:
    return bytes(public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))


def _read(data: bytes, what: str) -> Any:
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise InputError(f"{what} is not a certificate in PEM; restore the file from the project's folder") from error


def _key(data: bytes, what: str, load: Any) -> Any:
    try:
        return load(data, None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} cannot be read; restore the file from the project's folder") from error


def now() -> datetime:
    return datetime.now(UTC)
