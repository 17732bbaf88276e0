"""Every case: the real kernel, run by the host shim, gives what the numpy reference gives, always in the same bits."""

from __future__ import annotations

import pytest

from deepstitch.plugins.common.case import Case
from deepstitch.plugins.common.schema import PluginError
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import OPS, PluginOp, load

from .definition import cases, check

ORDERS = (0, 1, 2, 3)  # 0 is the natural order of blocks and threads, and is run twice


@pytest.mark.parametrize(("op", "case"), cases())
def test_kernel_is_the_reference(host_library: PluginLibrary, op: PluginOp, case: Case) -> None:
    inputs = case.make()
    with host_library.create(op.schema.name, case.attributes) as instance, instance.prepare(inputs) as call:
        call.enqueue()
        first = call.outputs()
        check(first, op, case)
        for order in ORDERS:
            call.enqueue(order)
            again = call.outputs()
            for name, value in first.items():
                assert value.tobytes() == again[name].tobytes(), f"{name} has other bits in order {order}"


@pytest.mark.parametrize(
    ("op", "refused"),
    [pytest.param(op, each, id=f"{op.folder}-{each.name}") for op in map(load, OPS) for each in op.refused],
)
def test_refused_before_anything_is_launched(host_library: PluginLibrary, op: PluginOp, refused: object) -> None:
    name, attributes, inputs, text = refused  # type: ignore[misc]
    with pytest.raises(PluginError) as raised:  # noqa: SIM117
        with host_library.create(op.schema.name, attributes) as instance, instance.prepare(inputs):
            pass  # prepare() checks and tells the shapes; only enqueue() launches
    assert text in str(raised.value), name
