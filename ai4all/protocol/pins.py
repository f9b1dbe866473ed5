"""Pins: the public keys that a coordinator may have, whatever an authority signs.

A pin is the SHA-256 of a certificate's SubjectPublicKeyInfo (RFC 7469, section 2.4), so it outlives
the renewal of a certificate that keeps its key. It comes on top of the usual verification.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ssl
from collections.abc import Collection

__all__ = ["PinMismatch", "check_pin", "format_pin", "parse_pin", "pin_of"]

_CURL_PREFIX = "sha256//"
_DIGEST_BYTES = hashlib.sha256().digest_size


class PinMismatch(ssl.SSLError):
    """The coordinator's key is none of those that were pinned."""

    def __init__(self, pin: bytes) -> None:
        text = f"its key is not one of coordinator.pin_sha256; it has {format_pin(pin)}"
        super().__init__(text)
        self.pin = pin
        self._text = text

    def __str__(self) -> str:
        return self._text


def parse_pin(text: str) -> bytes:
    """Read a pin: 64 hexadecimal digits, or base64, with curl's ``sha256//`` before it or without.

    Raises:
        ValueError: It is neither.
    """
    text = text.strip()
    try:
        if len(text) == 2 * _DIGEST_BYTES:
            digest = bytes.fromhex(text)
        else:
            digest = base64.b64decode(text.removeprefix(_CURL_PREFIX), validate=True)
    except (ValueError, binascii.Error):
        digest = b""
    if len(digest) != _DIGEST_BYTES:
        raise ValueError("must be the SHA-256 of a public key, in hexadecimal or base64")
    return digest


def format_pin(pin: bytes) -> str:
    """A pin as ``parse_pin`` and curl read it."""
    return _CURL_PREFIX + base64.b64encode(pin).decode("ascii")


def pin_of(certificate: bytes) -> bytes:
    """The pin of a certificate in DER.

    Raises:
        ImportError: The extra ``pin`` is not installed.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from cryptography.x509 import load_der_x509_certificate

    key = load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def check_pin(tls: ssl.SSLObject | None, pins: Collection[bytes]) -> None:
    """Refuse a connection whose peer has none of the pinned keys.

    Args:
        tls: What the connection's ``ssl_object`` is, after the handshake.
        pins: The pins that would do.

    Raises:
        PinMismatch: It has another key.
    """
    certificate = tls.getpeercert(binary_form=True) if tls is not None else None
    pin = pin_of(certificate) if certificate is not None else b""
    if pin not in pins:
        raise PinMismatch(pin)
