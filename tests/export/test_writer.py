"""The output folder appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deepstitch.errors import OutputError
from deepstitch.export import writer
from deepstitch.export.writer import BackgroundHashes, atomic_folder, copy_files, link_checkpoint, refuse_existing


def fill(folder: Path) -> None:
    (folder / "part.txt").write_text("half")


def bundle(folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_success_leaves_the_folder_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "out", overwrite=False) as folder:
        fill(folder)
        assert not (tmp_path / "new" / "out").exists(), "nothing is visible before the end"
    assert contents(tmp_path / "new") == {"out"} and contents(tmp_path / "new" / "out") == {"part.txt"}
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OutputError("x"), OSError(errno.EIO, "x")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    if overwrite:
        bundle(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out", overwrite=overwrite) as folder:
        fill(folder)
        raise error
    assert contents(tmp_path) == before
    if overwrite:
        assert contents(tmp_path / "out") == {"manifest.json"}, "the previous bundle is as it was"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(OutputError, match="out: the disk is full; nothing was written"),
        atomic_folder(tmp_path / "out", overwrite=False) as folder,
    ):
        fill(folder)
        raise OSError(code, os.strerror(code))
    assert contents(tmp_path) == set()


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    bundle(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already; choose another folder or pass --overwrite"):
        refuse_existing(tmp_path / "out", overwrite=False)
    with (
        pytest.raises(OutputError, match="exists already"),
        atomic_folder(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("the body must not run")
    assert contents(tmp_path / "out") == {"manifest.json"}


def test_overwrite_replaces_a_bundle(tmp_path: Path) -> None:
    bundle(tmp_path / "out")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
    assert contents(tmp_path) == {"out"} and contents(tmp_path / "out") == {"part.txt"}


def test_overwrite_replaces_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("also work")
    for name in ("thesis", "file"):
        with pytest.raises(OutputError, match="is not a bundle, so --overwrite does not replace it"):
            refuse_existing(tmp_path / name, overwrite=True)
    assert contents(tmp_path / "thesis") == {"chapter1.tex"}
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty", overwrite=True)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written"),
        atomic_folder(tmp_path / "file" / "out", overwrite=False),
    ):
        pytest.fail("the body must not run")


def test_links_are_the_same_file(tmp_path: Path) -> None:
    """Through the symbolic links of a download cache as well."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    (tmp_path / "out").mkdir()
    link_checkpoint([tmp_path / "model.safetensors"], tmp_path / "out")
    linked = tmp_path / "out" / "checkpoint" / "model.safetensors"
    assert not linked.is_symlink() and linked.samefile(tmp_path / "blobs" / "abc")


def test_hashes_made_in_the_background(tmp_path: Path) -> None:
    contents = {tmp_path / name: name.encode() * 2_000_000 for name in ("one", "three")}
    for path, content in contents.items():
        path.write_bytes(content)
    hashed: list[int] = []
    with BackgroundHashes(contents, hashed.append) as hashes:
        records = hashes.records()
    assert {path: record.sha256 for path, record in records.items()} == {
        path: hashlib.sha256(content).hexdigest() for path, content in contents.items()
    }
    assert sum(hashed) == sum(record.size for record in records.values()) == 16_000_000


def test_abandoned_hashes_stop(tmp_path: Path) -> None:
    """An export that fails early must not go on reading 61 GB."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    hashed: list[int] = []
    with pytest.raises(KeyError), BackgroundHashes([tmp_path / "large"], hashed.append):
        raise KeyError
    assert sum(hashed) < 1 << 30


def test_links_need_one_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(writer.os, "link", refuse)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(OutputError, match=r"cannot hard-link .*; put the bundle on the checkpoint's file system"):
        link_checkpoint([tmp_path / "model.safetensors"], tmp_path)


def test_copied_files_are_untouched(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = tiny_checkpoint("qwen3_vl_moe")
    (checkpoint / "tokenizer_config.json").write_bytes(b'{"odd":   "spacing"}\r\n')
    (checkpoint / "training_args.bin").write_bytes(b"not ours")
    copies = copy_files(checkpoint, tmp_path)
    assert contents(tmp_path) == {path.name for path in copies}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"} <= contents(tmp_path)
    assert not {"training_args.bin", "model.safetensors"} & contents(tmp_path)
    for path in copies:
        assert path.read_bytes() == (checkpoint / path.name).read_bytes()
