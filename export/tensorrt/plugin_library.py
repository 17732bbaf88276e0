"""Would TensorRT find the plugins of a graph in this library, and run them on that card?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from deepstitch.export.tensorrt.plugin_nodes import PluginNode
from deepstitch.plugins.build.contents import Contents, mismatches, read_library
from deepstitch.plugins.common.schema import DOMAIN, PluginError
from deepstitch.plugins.library import PluginLibrary

__all__ = ["library_problems"]


def library_problems(path: Path, sm: int, graphs: Iterable[onnx.ModelProto]) -> tuple[str, ...]:
    """What is wrong with a library that ``deepstitch plugins build`` wrote; its operators are asked for themselves.

    Args:
        path: the library.
        sm: compute capability of the card, without the dot.
        graphs: whose plugin nodes it is to make.

    Raises:
        InputError: there is no such library.
    """
    contents = read_library(path)
    said = list(_problems(contents, sm))
    if contents.described is not None:
        said += dict.fromkeys(_refused(PluginLibrary.open(path), graphs))
    return tuple(said)


def _refused(library: PluginLibrary, graphs: Iterable[onnx.ModelProto]) -> Iterator[str]:
    """What the library says to the attributes of each plugin node."""
    for graph in graphs:
        for node in graph.graph.node:
            if node.domain != DOMAIN:
                continue
            try:
                plugin = PluginNode.of(node)
                library.create(node.op_type, plugin.attributes).close()
            except PluginError as error:
                yield f"{node.op_type}: {error}"


def _problems(contents: Contents, sm: int) -> Iterator[str]:
    yield from mismatches(contents)
    if contents.described is None:
        yield f"it cannot be opened here, so its attributes are not known: {contents.not_opened}"
    if not contents.tensorrt:
        yield "it has no TensorRT adapters; build it with --tensorrt-root"
    if not any(_runs(target, sm) for target in contents.targets):
        yield f"it has no code for sm_{sm}, but for {', '.join(contents.targets) or 'the CPU'}; build it with --sm {sm}"


def _runs(target: str, sm: int) -> bool:
    """Machine code runs on later cards of its generation, PTX on every later card."""
    kind, number = target.split("_")
    same = int(number) // 10 == sm // 10
    return int(number) <= sm and (kind == "compute" or same)
