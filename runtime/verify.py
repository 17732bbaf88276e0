"""Are the files of a bundle those its manifest describes? Large files are hashed once and then remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from deepstitch.errors import BundleError, InputError, did_you_mean
from deepstitch.manifest import MANIFEST_NAME, FileRecord, Manifest, file_sha256

__all__ = [
    "CACHE_VARIABLE",
    "LARGE_FILE_BYTES",
    "VERIFY_VARIABLE",
    "Verify",
    "cache_folder",
    "remember_files",
    "verify_files",
    "verify_level",
    "verify_records",
]

Verify = Literal["auto", "full", "size"]
_LEVELS: tuple[Verify, ...] = ("auto", "full", "size")
VERIFY_VARIABLE = "DEEPSTITCH_VERIFY"
CACHE_VARIABLE = "DEEPSTITCH_CACHE"
LARGE_FILE_BYTES = 64 << 20  # below this a hash takes less than a tenth of a second

_REMEDY = "copy the bundle again, or export it again"


def verify_level(level: str | None) -> Verify:
    """Resolve the checking level: the argument, else the environment variable, else ``auto``.

    ``auto`` hashes every file, but a large one only when its path, size or modification time is new;
    ``full`` hashes everything; ``size`` compares sizes alone.

    Raises:
        InputError: not one of the three.
    """
    source = "verify" if level is not None else VERIFY_VARIABLE
    chosen = level if level is not None else os.environ.get(VERIFY_VARIABLE, "auto")
    for known in _LEVELS:
        if chosen == known:
            return known
    hint = did_you_mean(chosen, _LEVELS)
    raise InputError(f"{source}={chosen!r}{hint}; use one of {', '.join(_LEVELS)}")


def verify_files(folder: Path, manifest: Manifest, level: Verify, *, progress: bool) -> None:
    """Compare every file of a bundle with its record.

    Args:
        folder: the bundle.
        manifest: its manifest.
        level: see :func:`verify_level`.
        progress: show a bar on stderr while large files are hashed (never where stderr is no terminal).

    Raises:
        BundleError: a file is missing, has another size or other contents, or lies outside the folder.
    """
    verify_records(folder, manifest.files, level, progress=progress)


def verify_records(
    folder: Path, records: Mapping[str, FileRecord], level: Verify, *, progress: bool, remedy: str = _REMEDY
) -> None:
    """As :func:`verify_files`, for any records of files in a folder; ``remedy`` is what to do about a difference."""
    for name, record in records.items():
        _check_size(folder, name, record, remedy)
    if level == "size":
        return
    large: list[str] = []
    for name, record in records.items():
        if record.size >= LARGE_FILE_BYTES:
            large.append(name)
        else:
            _check_hash(folder / name, record, file_sha256(folder / name), remedy)
    if level == "auto":
        large = [name for name in large if not _is_remembered(folder / name, records[name])]
    _hash_large(folder, {name: records[name] for name in large}, progress=progress, remedy=remedy)


def remember_files(folder: Path, manifest: Manifest) -> None:
    """Take the large files of a bundle for checked: for the exporter, which has just hashed what it wrote."""
    for name, record in manifest.files.items():
        if record.size >= LARGE_FILE_BYTES:
            _remember(folder / name, record, (folder / name).stat())


def _check_size(folder: Path, name: str, record: FileRecord, remedy: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or ":" in name:
        raise BundleError(f"{folder / MANIFEST_NAME}: '{name}' lies outside the bundle; the manifest was edited")
    path = folder / name
    try:
        size = path.stat().st_size
    except OSError:
        raise BundleError(f"{path}: missing, the bundle is incomplete; {remedy}") from None
    if not path.is_file():
        raise BundleError(f"{path}: not a file; {remedy}")
    if size != record.size:
        raise BundleError(f"{path}: {size} bytes, the manifest says {record.size}; {remedy}")


def _check_hash(path: Path, record: FileRecord, sha256: str, remedy: str) -> None:
    if sha256 != record.sha256:
        raise BundleError(
            f"{path}: its contents changed since the export (sha256 {sha256[:12]}…, the manifest says "
            f"{record.sha256[:12]}…); {remedy}"
        )


def _hash_large(folder: Path, records: Mapping[str, FileRecord], *, progress: bool, remedy: str) -> None:
    from tqdm import tqdm

    if not records:
        return
    total = sum(record.size for record in records.values())
    # disable=None switches the bar off where stderr is no terminal
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="checking weights",
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for name, record in records.items():
            path = folder / name
            before = path.stat()
            _check_hash(path, record, file_sha256(path, bar.update), remedy)
            _remember(path, record, before)


def _is_remembered(path: Path, record: FileRecord) -> bool:
    try:
        stamp = json.loads(_stamp_path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _stamp(path, record, path.stat()))


def _remember(path: Path, record: FileRecord, state: os.stat_result) -> None:
    """Write the stamp; a read-only home only means hashing again next time."""
    target = _stamp_path(path)
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}")
        temporary.write_text(json.dumps(_stamp(path, record, state)), "utf-8")
        temporary.replace(target)


def _stamp(path: Path, record: FileRecord, state: os.stat_result) -> dict[str, str | int]:
    return {
        "path": str(path.resolve()),
        "size": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "sha256": record.sha256,
    }


def _stamp_path(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return cache_folder() / "verified" / f"{name}.json"


def cache_folder() -> Path:
    """Where this machine keeps what it can make again."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "deepstitch"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepstitch"
