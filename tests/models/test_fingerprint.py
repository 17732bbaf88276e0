"""A fingerprint belongs to the weights: not to the files they lie in, and not to less than all of them."""

from __future__ import annotations

import shutil

from deepstitch.models.checkpoint import Checkpoint
from deepstitch.models.fingerprint import fingerprint


def test_copies_and_other_shards_have_the_same(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    found = fingerprint(Checkpoint.open(folder).entries)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(Checkpoint.open(tmp_path / "copy").entries) == found
    assert fingerprint(Checkpoint.open(tiny_checkpoint(shards=2)).entries) == found
    assert fingerprint(Checkpoint.open(tiny_checkpoint(seed=1)).entries) != found


def test_either_end_of_any_tensor_counts(tiny_checkpoint):
    folder = tiny_checkpoint()
    entries = Checkpoint.open(folder).entries
    found = fingerprint(entries)
    for name in list(entries)[::7]:
        entry = entries[name]
        for place in (entry.offset, entry.offset + entry.nbytes - 1):
            with entry.path.open("r+b") as file:
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ 1]))
                file.flush()
                assert fingerprint(entries) != found
                file.seek(place)
                file.write(byte)
    assert fingerprint(entries) == found
