"""What a plugin library holds, read from the file: operators, machine code by architecture, figures of each kernel.

The file is looked at before it is opened, since opening a library runs code of it. A library with TensorRT adapters
opens only where TensorRT is found; what the file shows without that is reported all the same.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepstitch.errors import DeepstitchError, InputError
from deepstitch.plugins.build import cubin, fatbin, static_checks
from deepstitch.plugins.build.library import SECTION
from deepstitch.plugins.build.toolchain import ToolchainError
from deepstitch.plugins.common.schema import OpSchema
from deepstitch.plugins.registry import OPS

__all__ = [
    "Code",
    "Contents",
    "failures",
    "formats_of",
    "kernels_of",
    "mismatches",
    "read_library",
    "schema_of",
    "static_figures",
]

_ENTRY = "deepstitch_describe"
_TENSORRT = ("getPluginCreators", "getCreators")  # of IPluginV2 and IPluginV3 libraries


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The machine code of one operator: what each architecture's kernels are, and the images."""

    op: str
    targets: tuple[str, ...]
    images: tuple[fatbin.Image, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A plugin library.

    Attributes:
        path: the file.
        creators: what TensorRT's loader looks for: ``getPluginCreators`` before 10, ``getCreators`` from there on.
        described: what the library says about itself; None where it could not be opened.
        not_opened: why.
        code: by operator; empty for a library that runs on the CPU.
    """

    path: Path
    creators: tuple[str, ...]
    described: Mapping[str, Any] | None
    not_opened: str | None
    code: tuple[Code, ...]

    @property
    def tensorrt(self) -> bool:
        """Whether it has adapters for TensorRT."""
        return bool(self.creators)

    @property
    def targets(self) -> tuple[str, ...]:
        """Architectures that every operator has code for."""
        common = set.intersection(*(set(each.targets) for each in self.code)) if self.code else set()
        return tuple(sorted(common, key=lambda each: (each.startswith("compute"), int(each.split("_")[1]))))


def read_library(path: Path) -> Contents:
    """Read a library.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; deepstitch plugins build writes a plugin library") from error
    try:
        sections = cubin.sections(data)
        exported = _exported(sections)
    except (ToolchainError, struct.error) as error:
        raise InputError(f"{path} is no shared library ({error}); deepstitch plugins build writes one") from None
    if _ENTRY not in exported:
        raise InputError(f"{path} is a shared library, but not a plugin library: it exports no {_ENTRY}")
    described, reason = _describe(path)
    return Contents(
        path=path,
        creators=tuple(name for name in _TENSORRT if name in exported),
        described=described,
        not_opened=reason,
        code=tuple(_code(path, name, data) for name, data in sections.items() if name.startswith(SECTION)),
    )


def _exported(sections: Mapping[str, bytes]) -> set[str]:
    """Names of the dynamic symbols that are defined in the library."""
    table, names = sections.get(".dynsym", b""), sections.get(".dynstr", b"")
    found = set()
    for offset in range(0, len(table) - 23, 24):
        name, _, _, section = struct.unpack_from("<IBBH", table, offset)
        if section:
            found.add(names[name : names.find(b"\0", name)].decode("ascii", "replace"))
    return found


def _describe(path: Path) -> tuple[Mapping[str, Any] | None, str | None]:
    try:
        describe = ctypes.CDLL(str(path.resolve()))[_ENTRY]
    except OSError as error:
        return None, str(error)
    describe.restype = ctypes.c_char_p
    return json.loads(describe().decode("utf-8")), None


def _code(path: Path, section: str, data: bytes) -> Code:
    op = section.removeprefix(SECTION)
    try:
        images = fatbin.unpack(data)
        for each in images:
            if each.kind == "cubin" and each.data is not None and cubin.read_cubin(each.data).sm != each.sm:
                raise ToolchainError(f"machine code marked sm_{each.sm} is for another architecture")
    except (ToolchainError, struct.error) as error:
        raise InputError(f"{path}: the code of {op} is damaged ({error}); build the library again") from None
    names = {"cubin": "sm_", "ptx": "compute_"}
    targets = tuple(f"{names[each.kind]}{each.sm}" for each in images if each.kind in names)
    return Code(op=op, targets=targets, images=tuple(images))


def kernels_of(code: Code) -> tuple[str, ...]:
    """Names of an operator's kernels, from the first image that can be read."""
    for each in code.images:
        if each.kind == "cubin" and each.data is not None:
            return tuple(kernel.name for kernel in cubin.read_cubin(each.data).kernels)
    return ()


def static_figures(contents: Contents) -> dict[str, list[static_checks.Figures]]:
    """Figures of each operator's sm_61 code, where the library has that and it is not compressed."""
    found = {}
    for code in contents.code:
        image = next((each.data for each in code.images if each.kind == "cubin" and each.sm == 61 and each.data), None)
        ptx = next((each.data for each in code.images if each.kind == "ptx" and each.data), b"")
        if image:
            found[code.op] = static_checks.figures(code.op, image, ptx)
    return found


def mismatches(contents: Contents) -> list[str]:
    """How the library differs from what this deepstitch declares; empty where it does not."""
    said = []
    if contents.described is not None:
        said += _against_schemas(contents.described)
        claimed = set(contents.described.get("targets", ()))
        for code in contents.code:
            if set(code.targets) != claimed:
                said.append(f"{code.op} has code for {', '.join(code.targets)}; the library says {sorted(claimed)}")
    return said


def schema_of(folder: str) -> OpSchema:
    """An operator's declaration, without its cases and reference."""
    schema: OpSchema = importlib.import_module(f"deepstitch.plugins.{folder}.schema").SCHEMA
    return schema


def formats_of(schema: OpSchema) -> dict[str, list[str]]:
    """What weights and caches may be stored as; of an operator without such a choice, its first input."""
    formats = {each.name: list(each.choices) for each in schema.attributes if each.name.endswith("format")}
    if formats:
        return formats
    plain: dict[str, Any] = {"int": 1, "float": 1.0, "string": "", "ints": [1]}
    required = [each for each in schema.attributes if each.required]
    given = {each.name: each.choices[0] if each.choices else plain[each.kind] for each in required}
    first = schema.inputs(schema.resolve(given))[0]
    return {first.name: list(first.dtypes)}


def _against_schemas(described: Mapping[str, Any]) -> list[str]:
    said = []
    present = {each["name"]: each for each in described["ops"]}
    for folder, name in OPS.items():
        if name not in present:
            said.append(f"there is no {name}")
            continue
        schema = schema_of(folder)
        own = {each.name: (each.kind, each.required) for each in schema.attributes}
        theirs = {each["name"]: (each["kind"], each["required"]) for each in present[name]["attributes"]}
        if present[name]["version"] != schema.version:
            said.append(f"{name} has version {present[name]['version']}, deepstitch declares {schema.version}")
        if own != theirs:
            differing = sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key))
            said.append(f"{name} differs from its declaration in the attributes {', '.join(differing)}")
    said += [f"{name} is unknown to this deepstitch" for name in present if name not in OPS.values()]
    return said


def failures(contents: Contents, figures: Mapping[str, Sequence[static_checks.Figures]]) -> list[str]:
    """Everything that :func:`mismatches` finds, and what the figures of sm_61 do not fulfil."""
    said = mismatches(contents)
    for op, found in figures.items():
        try:
            said += static_checks.problems(found, static_checks.expected_of(op))
        except (DeepstitchError, ModuleNotFoundError) as error:
            said.append(f"{op}: {error}")
    return said
