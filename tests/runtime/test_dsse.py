"""DSSE envelopes: what is written is read again, and nothing else is."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from router_runtime.errors import FormatError
from router_runtime.trust import dsse
from router_runtime.trust.dsse import Envelope, Signature
from tests.runtime import releases
from tests.runtime.releases import KEY, OTHER_KEY

pytestmark = pytest.mark.one_torch

SIGNATURES = st.builds(Signature, keyid=st.text(max_size=20), signature=st.binary(max_size=80))
ENVELOPES = st.builds(
    Envelope,
    payload=st.binary(max_size=200),
    signatures=st.lists(SIGNATURES, min_size=1, max_size=16).map(tuple),
)


@given(ENVELOPES)
def test_round_trip(envelope: Envelope) -> None:
    data = dsse.dumps(envelope)
    assert dsse.loads(data) == envelope
    assert dsse.dumps(dsse.loads(data)) == data


@given(ENVELOPES, st.data())
def test_any_other_bytes_are_refused_or_read_as_they_are(
    envelope: Envelope, data: st.DataObject
) -> None:
    """No byte is ignored: what is read is written as it was, up to its layout."""
    text = bytearray(dsse.dumps(envelope))
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    try:
        found = dsse.loads(bytes(text))
    except FormatError:
        return
    assert json.loads(text).keys() == json.loads(dsse.dumps(found)).keys()


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_signature_is_over_one_payload(payload: bytes, other: bytes) -> None:
    signature = Signature("", KEY.sign(dsse.signed_bytes(payload)))
    key = KEY.public_key()
    assert dsse.is_signed_by(Envelope(payload, (signature,)), key)
    assert dsse.is_signed_by(Envelope(other, (signature,)), key) == (payload == other)
    assert not dsse.is_signed_by(Envelope(payload, (signature,)), OTHER_KEY.public_key())


def test_it_is_what_the_specification_says() -> None:
    """Written here by hand, from the text of the specification."""
    envelope = dsse.loads(json.dumps(releases.envelope_of(b"{}", OTHER_KEY, KEY)).encode())
    assert dsse.is_signed_by(envelope, KEY.public_key())
    assert dsse.signed_bytes(b"hello") == b"DSSEv1 28 application/vnd.in-toto+json 5 hello"


@given(st.binary(min_size=32, max_size=32))
def test_keys(seed: bytes) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    raw = key.public_bytes_raw()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert dsse.read_public_key(pem, "a key").public_bytes_raw() == raw
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert dsse.fingerprint(raw) == hashlib.sha256(der).hexdigest()


@pytest.mark.parametrize("keyid", [1, None, ["a"]])
def test_a_key_id_is_text(keyid: object) -> None:
    document = json.loads(dsse.dumps(Envelope(b"{}", (Signature("a", b"b"),))))
    document["signatures"][0]["keyid"] = keyid
    with pytest.raises(FormatError, match="keyid: expected text"):
        dsse.loads(json.dumps(document).encode())


def test_base64_is_strict() -> None:
    document = json.loads(dsse.dumps(Envelope(b"{}", (Signature("a", b"b"),))))
    document["payload"] = base64.b64encode(b"{}").decode() + "\n"
    with pytest.raises(FormatError, match="payload: expected base64"):
        dsse.loads(json.dumps(document).encode())
