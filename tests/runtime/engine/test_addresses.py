"""Addresses TensorRT is given: rows of a tensor begin where they begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepstitch.errors import DeviceError
from deepstitch.runtime.engine.memory import DeviceArray
from deepstitch.runtime.engine.tensorrt.graph import _Call

NOWHERE: Any = None
WHOLE = {name: DeviceArray(512, (4, 96), np.float16, memory=NOWHERE, owner=None) for name in ("past", "present")}


def bind(past: DeviceArray, present: DeviceArray) -> dict[str, int]:
    graph: Any = SimpleNamespace(
        memory=None, dtypes=dict.fromkeys(WHOLE, np.dtype("float16")), contract=SimpleNamespace(file="decoder.onnx")
    )
    context: Any = None
    return _Call(graph, context, {"past": past}, {"present": present}).addresses


def test_rows_at_a_multiple_of_256() -> None:
    assert bind(**WHOLE) == {"past": 512, "present": 512}
    assert bind(**{name: rows[4:] for name, rows in WHOLE.items()}) == {"past": 1280, "present": 1280}


@pytest.mark.parametrize("name", WHOLE)
def test_rows_that_begin_elsewhere(name: str) -> None:
    """TensorRT would refuse or compute garbage; what to do about it is said."""
    with pytest.raises(DeviceError, match=f"decoder.onnx: rows of {name} begin at 0x2c0, .* --max-context") as caught:
        bind(**WHOLE | {name: WHOLE[name][1:]})
    assert "\n" not in str(caught.value)
