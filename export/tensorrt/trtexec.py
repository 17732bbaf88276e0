"""The ``trtexec`` command that builds the same engine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from deepstitch.engine_manifest import EngineProfile
from deepstitch.export.tensorrt.plan_from_onnx import GraphSource

__all__ = ["trtexec_command"]

_CORNERS = ("min", "opt", "max")
MIB = 1 << 20


def trtexec_command(source: GraphSource, files: Mapping[str, Path], version: tuple[int, ...]) -> str:
    """For a graph.

    Args:
        source: of the engine. ``trtexec`` of 8.6 takes one profile; it gets the first, which holds the sizes of the
            others too.
        files: by the flags that name them: ``saveEngine``, ``timingCacheFile`` and, with plugins, ``dynamicPlugins``.
        version: of TensorRT.
    """
    words = ["trtexec", f"--onnx={source.path}", *(f"--{flag}={path}" for flag, path in files.items())]
    words += [f"--memPoolSize=workspace:{source.workspace / MIB:g}", "--maxAuxStreams=0"]
    typed_anyway = version >= (11,)
    words += [word for word in source.precision.words() if not (typed_anyway and word == "--stronglyTyped")]
    several = version >= (10,) and len(source.profiles) > 1
    for number, profile in enumerate(source.profiles if several else source.profiles[:1]):
        words += [f"--profile={number}"] if several else []
        words += [f"--{corner}Shapes={_shapes(profile, place)}" for place, corner in enumerate(_CORNERS)]
    words.append("--skipInference")
    return shlex.join(words)


def _shapes(profile: EngineProfile, corner: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, corners[corner]))}" for name, corners in profile.shapes.items())
