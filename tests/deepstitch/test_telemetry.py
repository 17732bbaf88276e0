"""Nothing is reported to anyone: onnxruntime's own telemetry is off before its first import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = """
import deepstitch
import os, time
import onnxruntime
from onnx import TensorProto, helper

value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab"]
graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize(("wish", "reports"), [(None, False), ("0", True)])
def test_onnxruntime_keeps_no_record_of_its_use(tmp_path: Path, wish: str | None, reports: bool) -> None:
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    if wish is not None:
        env["ORT_DISABLE_TELEMETRY"] = wish
    subprocess.run([sys.executable, "-c", SESSION], env=env, check=True, timeout=120)
    left = [path for path in tmp_path.rglob("*") if "onnxruntime" in str(path.relative_to(tmp_path))]
    if reports and not left:
        pytest.skip("this build of onnxruntime has no telemetry to switch off")
    assert bool(left) == reports
