"""The machine engines are built on: its card, its TensorRT, its plugin library. Whatever is missing is said first."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from deepstitch.errors import DeviceError, InputError, UnsupportedError
from deepstitch.export.tensorrt.build_check import SMS, parser_of
from deepstitch.plugins.build.contents import Contents, read_library
from deepstitch.plugins.common.cuda_driver import CudaDriver
from deepstitch.plugins.common.schema import DOMAIN, PluginError
from deepstitch.runtime.engine.cuda import probe_driver
from deepstitch.runtime.engine.tensorrt.api import TensorRT, version_of

__all__ = ["BuildMachine"]

_MAJORS = {"trt8": (8,), "trt10": (10, 11)}
_INSTALL = {
    "trt8": "pip install --extra-index-url https://pypi.nvidia.com tensorrt==8.6.1 'nvidia-cudnn-cu12<9'",
    "trt10": "pip install tensorrt-cu12",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildMachine:
    """What was found.

    Attributes:
        tensorrt: of a version the target is for.
        card: name of the card.
        sm: its compute capability, without the dot.
        free_bytes: of its memory, now.
    """

    tensorrt: TensorRT
    card: str
    sm: int
    free_bytes: int

    @classmethod
    def find(cls, target: str, sm: int | None) -> BuildMachine:
        """Look at this machine. The driver comes first: without one, TensorRT 8.6 ends the process.

        Args:
            target: of the bundle.
            sm: that was asked for; None: whatever the card has.

        Raises:
            DeviceError: no driver, no card, or a card of another kind.
            UnsupportedError: no TensorRT, or one the target is not for.
        """
        parser_of(target)
        probe_driver()
        tensorrt = TensorRT.load()
        _check_version(tensorrt, target)
        try:
            driver = CudaDriver()
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        except PluginError as error:
            raise DeviceError(f"the card cannot be used: {error}; see what 'nvidia-smi' says") from None
        major, minor = driver.capability
        found = cls(tensorrt=tensorrt, card=driver.name, sm=major * 10 + minor, free_bytes=free.value)
        found._check_card(target, sm)
        return found

    def _check_card(self, target: str, sm: int | None) -> None:
        if sm not in (None, self.sm):
            raise DeviceError(
                f"--sm {sm}: the card here, {self.card}, has {self.sm}, and engines work only on the kind of card that "
                "builds them; build on that card, or leave the flag out"
            )
        if self.sm not in SMS[target]:
            other = next((name for name, sms in SMS.items() if self.sm in sms), None)
            remedy = f"export with --target {other}" if other else "use another card"
            known = ", ".join(map(str, SMS[target]))
            raise UnsupportedError(
                f"{self.card} has compute capability {self.sm}; --target {target} is for {known}: {remedy}"
            )

    def library(self, given: Path | None, graphs: Iterable[onnx.ModelProto]) -> tuple[Path, Contents] | None:
        """The library that has the plugins of the graphs, and what it holds; None where they have no plugins.

        Args:
            given: by the user; None: the one ``deepstitch plugins build`` leaves in the current folder.
            graphs: of the bundle.

        Raises:
            InputError: there is none, it is no plugin library, or one for another TensorRT.
        """
        if not any(node.domain == DOMAIN for graph in graphs for node in graph.graph.node):
            return None
        major = version_of(self.tensorrt.module)[0]
        remedy = (
            f"build it with 'deepstitch plugins build --sm {self.sm} --tensorrt-root DIR', DIR being the folder of "
            f"TensorRT {major}"
        )
        library = given or Path(f"libdeepstitch_plugins_trt{major}.so")
        if given is None and not library.is_file():
            raise InputError(
                f"the graphs need the plugin library, and there is no {library} in this folder; {remedy}, and name it "
                "with --plugins"
            )
        contents = read_library(library)
        if contents.tensorrt and ("getPluginCreators" if major < 10 else "getCreators") not in contents.creators:
            raise InputError(f"{library} is for another TensorRT than the {self.tensorrt.version} here; {remedy}")
        return library, contents


def _check_version(tensorrt: TensorRT, target: str) -> None:
    major = version_of(tensorrt.module)[0]
    if major in _MAJORS[target]:
        return
    other = next((name for name, majors in _MAJORS.items() if major in majors), None)
    instead = f", or export with --target {other}" if other else ""
    raise UnsupportedError(
        f"--target {target} is for TensorRT {' and '.join(map(str, _MAJORS[target]))}, here is {tensorrt.version}; "
        f"install that ({_INSTALL[target]}){instead}"
    )
