"""Tokens, sessions and the subjects of certificates."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput, Refused, Unavailable
from common.pages.access import Token, Viewer, viewer_of_subject
from common.pages.serving import listen, listen_unix


def test_a_token_file_is_made_private_and_read_again(tmp_path):
    first = Token.load_or_create(tmp_path / "token")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    text = (tmp_path / "token").read_text().strip()
    assert len(text) >= 43
    assert first.admits(text)
    assert Token.load_or_create(tmp_path / "token").admits(text)
    assert not first.admits(text[:-1])
    assert not first.admits("")
    assert not first.admits("ü" * 43)


def test_a_token_that_others_can_read_or_that_is_none_is_refused(tmp_path):
    file = tmp_path / "token"
    Token.load_or_create(file)
    os.chmod(file, 0o640)
    with pytest.raises(Refused, match="others may read"):
        Token.load_or_create(file)
    os.chmod(file, 0o600)
    file.write_text("short\n")
    with pytest.raises(InvalidInput, match="32 to 256"):
        Token.load_or_create(file)
    with pytest.raises(Unavailable):
        Token.load_or_create(tmp_path / "missing" / "token")


def test_a_session_ends_with_its_time_and_with_its_token():
    door, other = Token("a" * 43), Token("b" * 43)
    session = door.session(now=1000.0)
    assert door.holds(session, now=1000.0 + Token.LASTS_S - 1)
    assert not door.holds(session, now=1000.0 + Token.LASTS_S)
    assert not other.holds(session, now=1000.0)
    end, _, signature = session.partition(".")
    assert not door.holds(f"{int(end) + 1}.{signature}", now=1000.0)


@given(st.text())
def test_nothing_made_up_is_a_session(text):
    assert not Token("a" * 43).holds(text, now=0.0)


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_name_makes_a_subject_of_another_role(name, unit):
    viewer = viewer_of_subject(f"CN={name},OU={unit},O=Cloister federation")
    if viewer is not None:
        assert viewer == Viewer(viewer.role, name)
        assert viewer.role == unit
        assert viewer.role in ("auditor", "client")
        assert name.isascii()


def test_the_socket_is_its_owners_alone_and_takes_the_place_of_a_dead_one(tmp_path):
    path = tmp_path / "dashboard.sock"
    before = os.umask(0)
    try:
        listen_unix(path).close()
        again = listen_unix(path)
        assert path.stat().st_mode & 0o777 == 0o600
        again.close()
    finally:
        os.umask(before)
    plain = tmp_path / "a-file"
    plain.write_text("kept")
    with pytest.raises(Unavailable):
        listen_unix(plain)
    assert plain.read_text() == "kept"


def test_an_address_that_is_taken_says_so():
    first = listen("127.0.0.1", 0)
    first.listen()
    with pytest.raises(Unavailable, match="cannot listen"):
        listen("127.0.0.1", first.getsockname()[1])
    first.close()
