"""Signatures bind kind and body; keys are saved whole, privately, and once."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput, Refused
from common.signing import SigningKey, canonical, digest, fingerprint, verify

KEY = SigningKey.generate()
BODY = {"round": 1, "client": "Klinik Süd", "epsilon": 0.1}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(), min_size=1))
def test_what_was_signed_verifies_and_nothing_else_does(body):
    signature = KEY.sign("plan", body)
    verify(KEY.public_key, "plan", dict(reversed(body.items())), signature)
    with pytest.raises(Refused):
        verify(KEY.public_key, "plan", body | {"one more": 1}, signature)
    with pytest.raises(Refused):
        verify(KEY.public_key, "head", body, signature)


def test_another_key_does_not_verify():
    with pytest.raises(Refused, match=fingerprint(KEY.public_key)):
        verify(KEY.public_key, "plan", BODY, SigningKey.generate().sign("plan", BODY))


def test_every_changed_bit_of_a_signature_is_refused():
    import base64

    raw = base64.b64decode(KEY.sign("plan", BODY))
    for index in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[index // 8] ^= 1 << (index % 8)
        with pytest.raises(Refused):
            verify(KEY.public_key, "plan", BODY, base64.b64encode(changed).decode())


@pytest.mark.parametrize("signature", ["", "not base64!", "AAAA", "é", None, 5, [], {}, b"\xff"])
@pytest.mark.parametrize("key", [pytest.param(KEY.public_key, id="own"), "", "short", None, 7])
def test_whatever_comes_as_key_or_signature_is_refused_and_never_an_exception_of_another_kind(key, signature):
    with pytest.raises(Refused):
        verify(key, "plan", BODY, signature)


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": "\ud800"}])
def test_a_body_without_a_canonical_form_is_refused(body):
    with pytest.raises(Refused):
        verify(KEY.public_key, "plan", body, KEY.sign("plan", BODY))


def test_equal_bodies_give_equal_bytes_and_signatures():
    expected = '{"a":[1,"é"],"b":1.0}'.encode()
    assert canonical({"b": 1.0, "a": [1, "é"]}) == canonical({"a": [1, "é"], "b": 1.0}) == expected
    assert KEY.sign("plan", BODY) == KEY.sign("plan", dict(reversed(BODY.items())))
    assert digest(BODY) == digest(dict(reversed(BODY.items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_outside_json_is_ever_signed(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical({"epsilon": value})


def test_a_key_is_saved_for_its_owner_alone_and_read_again(tmp_path):
    path = tmp_path / "keys" / "own.key"
    KEY.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public_key == KEY.public_key
    assert os.listdir(path.parent) == ["own.key"]


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "own.key"
    KEY.save(path)
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(path)
    assert SigningKey.load(path).public_key == KEY.public_key
    assert os.listdir(tmp_path) == ["own.key"]


def test_a_crash_while_a_key_is_written_leaves_no_half_key(tmp_path, monkeypatch):
    path = tmp_path / "own.key"

    def power_cut(_descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power_cut)
        with pytest.raises(KeyboardInterrupt):
            KEY.save(path)
    assert not path.exists()
    assert SigningKey.load_or_create(path).public_key == SigningKey.load_or_create(path).public_key


@pytest.mark.parametrize("content", [b"", b"AAAA\n", b"\xff\xfe", b"not base64 at all"])
def test_a_file_that_holds_no_key_is_named(tmp_path, content):
    path = tmp_path / "own.key"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"own\.key"):
        SigningKey.load(path)


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.key"):
        SigningKey.load(tmp_path / "none.key")


@given(json_values)
def test_a_digest_is_64_hexadecimal_digits_of_any_json(value):
    try:
        found = digest(value)
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    assert len(found) == 64
    assert int(found, 16) >= 0
