"""Every case of every operator under the address and undefined-behaviour sanitizers, in one process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deepstitch.plugins.registry import OPS, load

PROGRAM = """
import sys
from pathlib import Path
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import load

library = PluginLibrary.open(Path(sys.argv[1]))
op = load(sys.argv[2])
for case in op.cases:
    print(case.name, flush=True)
    library.run(op.schema.name, case.attributes, case.make(), order_seed=1)
for refused in op.refused:
    print(refused.name, flush=True)
    try:
        library.run(op.schema.name, refused.attributes, refused.inputs)
    except Exception as error:
        assert refused.text in str(error)
print("finished")
"""


@pytest.mark.parametrize("folder", OPS)
def test_sanitizers_find_nothing(
    sanitized_library: Path, run_sanitized: Callable[..., subprocess.CompletedProcess[str]], folder: str
) -> None:
    finished = run_sanitized([sys.executable, "-c", PROGRAM, str(sanitized_library), folder])
    printed = finished.stdout.splitlines()
    assert finished.returncode == 0, f"at {printed[-1:]}:\n{finished.stderr[-8000:]}"
    op = load(folder)
    assert printed == [*(each.name for each in (*op.cases, *op.refused)), "finished"]
    assert "runtime error" not in finished.stderr and "AddressSanitizer" not in finished.stderr
