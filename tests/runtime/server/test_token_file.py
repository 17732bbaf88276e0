"""The file with the shared secret."""

from __future__ import annotations

import pytest

from deepstitch.errors import InputError
from deepstitch.runtime.server.token_file import read_token


def write(tmp_path, content: bytes, mode: int = 0o600):
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_token(tmp_path):
    assert read_token(write(tmp_path, b"0123456789abcdef\n")) == "0123456789abcdef"
    assert read_token(write(tmp_path, b"0123456789abcdef", 0o400)) == "0123456789abcdef"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_others_may_not_read_it(tmp_path, mode):
    path = write(tmp_path, b"0123456789abcdef", mode)
    with pytest.raises(InputError, match=rf"others may read it \(mode {mode:04o}\); chmod 600 "):
        read_token(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"short", b"two words and more", b"0123456789abcdef\nsecond line", b"\xff" * 20, b"x" * 2000],
)
def test_no_token(tmp_path, content):
    with pytest.raises(InputError, match="openssl rand"):
        read_token(write(tmp_path, content))


def test_a_refusal_does_not_tell_the_secret(tmp_path):
    with pytest.raises(InputError) as refused:
        read_token(write(tmp_path, b"hush hush hush hush"))
    assert "hush" not in str(refused.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_token(tmp_path / "nothing")
    with pytest.raises(InputError, match="token file"):
        read_token(tmp_path)
