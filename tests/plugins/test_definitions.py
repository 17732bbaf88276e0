"""Every case: the ONNX function, run by ONNX Runtime, gives what the numpy reference gives."""

from __future__ import annotations

import pytest

from deepstitch.plugins.common.case import Case
from deepstitch.plugins.registry import PluginOp

from .definition import cases, check, run_definition


@pytest.mark.parametrize(("op", "case"), cases())
def test_definition_is_the_reference(op: PluginOp, case: Case) -> None:
    check(run_definition(op, dict(case.attributes), case.make()), op, case)
