"""Writes ``tensorrt/api.json``: what the real Python bindings have, of the names the stand-in implements.

The bindings carry the signatures in their docstrings and import without a GPU. They do not need TensorRT's libraries
for that either: libraries of the same names with nothing behind their functions do. In a folder of its own::

    pip download --no-deps --only-binary=:all: tensorrt_bindings==8.6.1 tensorrt_cu12_bindings==10.13.3.9
    python tests/fake_tensorrt/read_api.py *.whl > tests/fake_tensorrt/tensorrt/api.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CLASSES = {
    "ILogger": ["__init__", "log"],
    "Logger": ["__init__", "log", "min_severity"],
    "Builder": [
        "__init__",
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
        "get_plugin_registry",
        "gpu_allocator",
        "max_threads",
        "platform_has_fast_fp16",
        "platform_has_fast_int8",
    ],
    "INetworkDefinition": [
        "__getitem__",
        "__len__",
        "flags",
        "get_flag",
        "get_input",
        "get_layer",
        "get_output",
        "name",
        "num_inputs",
        "num_layers",
        "num_outputs",
    ],
    "ITensor": ["dtype", "name", "shape", "is_shape_tensor", "is_execution_tensor"],
    "ILayer": [
        "get_input",
        "get_output",
        "name",
        "num_inputs",
        "num_outputs",
        "precision",
        "precision_is_set",
        "set_output_type",
        "type",
    ],
    "OnnxParser": ["__init__", "clear_errors", "get_error", "num_errors", "parse", "parse_from_file", "set_flag"],
    "ParserError": ["code", "desc", "file", "func", "line", "node", "node_name", "node_operator"],
    "IBuilderConfig": [
        "add_optimization_profile",
        "builder_optimization_level",
        "clear_flag",
        "create_timing_cache",
        "flags",
        "get_flag",
        "get_memory_pool_limit",
        "get_preview_feature",
        "get_timing_cache",
        "max_aux_streams",
        "max_workspace_size",
        "num_optimization_profiles",
        "plugins_to_serialize",
        "profiling_verbosity",
        "progress_monitor",
        "set_flag",
        "set_memory_pool_limit",
        "set_preview_feature",
        "set_timing_cache",
    ],
    "IOptimizationProfile": ["__bool__", "get_shape", "set_shape"],
    "ITimingCache": ["combine", "reset", "serialize"],
    "IProgressMonitor": ["__init__", "phase_finish", "phase_start", "step_complete"],
    "IHostMemory": ["dtype", "nbytes"],
    "Runtime": [
        "__init__",
        "deserialize_cuda_engine",
        "engine_host_code_allowed",
        "get_plugin_registry",
        "gpu_allocator",
        "logger",
        "max_threads",
    ],
    "ICudaEngine": [
        "create_execution_context",
        "create_execution_context_without_device_memory",
        "device_memory_size",
        "device_memory_size_v2",
        "get_device_memory_size_for_profile",
        "get_device_memory_size_for_profile_v2",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "is_shape_inference_io",
        "name",
        "num_aux_streams",
        "num_io_tensors",
        "num_layers",
        "num_optimization_profiles",
    ],
    "IExecutionContext": [
        "active_optimization_profile",
        "all_binding_shapes_specified",
        "device_memory",
        "engine",
        "execute_async_v3",
        "get_max_output_size",
        "get_tensor_address",
        "get_tensor_shape",
        "infer_shapes",
        "name",
        "set_aux_streams",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
        "update_device_memory_size_for_shapes",
    ],
    "IVersionedInterface": [],
    "IGpuAllocator": [
        "__init__",
        "allocate",
        "allocate_async",
        "deallocate",
        "deallocate_async",
        "free",
        "reallocate",
    ],
    "IGpuAsyncAllocator": ["__init__", "allocate", "allocate_async", "deallocate", "deallocate_async"],
    "IPluginRegistry": [
        "all_creators",
        "deregister_library",
        "get_creator",
        "get_plugin_creator",
        "load_library",
        "plugin_creator_list",
    ],
    "IPluginCreatorInterface": [],
    "IPluginCreator": ["name", "plugin_namespace", "plugin_version"],
    "IPluginCreatorV3One": ["name", "plugin_namespace", "plugin_version"],
    "Dims": ["__init__", "__getitem__", "__len__"],
}
ENUMS = [
    "BuilderFlag",
    "DataType",
    "ErrorCode",
    "ExecutionContextAllocationStrategy",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParserFlag",
    "PreviewFeature",
    "ProfilingVerbosity",
    "TensorIOMode",
    "TensorLocation",
]
FUNCTIONS = ["get_plugin_registry", "init_libnvinfer_plugins"]
_STUBBED = re.compile(r"_ZN(11nvuff|14nvcaffe)|create(Infer|Nv)|get(Builder|NvOnnx|Plugin)|initLib")


def api_of(folder: Path) -> dict[str, Any]:
    """Of the unpacked bindings in this folder; in a process of its own, as only one version can be imported."""
    script = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(folder)!r}]; import read_api; read_api.describe()"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout)


def unpacked(wheel: Path, folder: Path) -> Path:
    """The folder, with the bindings of a wheel and what they need to be imported."""
    zipfile.ZipFile(wheel).extractall(folder)
    add_libraries(folder)
    return folder


def add_libraries(folder: Path) -> None:
    """TensorRT's libraries, as far as importing the bindings looks: their names and functions."""
    bindings = next(folder.glob("*/tensorrt.so"))
    read = subprocess.run(["readelf", "-dW", "--dyn-syms", bindings], capture_output=True, text=True, check=True).stdout
    functions = sorted({name for name in re.findall(r" UND (\w+)", read) if _STUBBED.match(name)})
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions), "utf-8")
    for name in re.findall(r"NEEDED.*\[(libnv\w+\.so\.\d+)\]", read):
        made = bindings.parent / name
        command = ["gcc", "-shared", "-fPIC", "-w", str(source), f"-Wl,-soname,{name}", "-o", str(made)]
        subprocess.run(command, check=True)


def describe() -> None:
    """Print what the ``tensorrt_bindings`` on the path have."""
    import tensorrt_bindings as found

    print(json.dumps(read(found)))


def read(found: Any) -> dict[str, Any]:
    """Members by class, values by enum, and functions."""
    return {
        "version": found.__version__,
        "classes": {name: _class(getattr(found, name), CLASSES[name]) for name in CLASSES if hasattr(found, name)},
        "enums": {
            name: {each: int(value) for each, value in getattr(found, name).__members__.items()}
            for name in ENUMS
            if hasattr(found, name)
        },
        "functions": {name: _signatures(name, getattr(found, name)) for name in FUNCTIONS if hasattr(found, name)},
    }


def _class(kind: Any, members: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in members:
        value = next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)
        if isinstance(value, property):
            made[name] = "rw" if value.fset else "ro"
        elif value is not None and (signatures := _signatures(name, value)):
            made[name] = signatures
    return made


def _signatures(name: str, value: Any) -> list[str]:
    """As ``["input: str, min: Dims"]``, one for each overload, ``self`` left out."""
    lines = (line.strip() for line in (value.__doc__ or "").splitlines())
    found = (re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) ->", line) for line in lines)
    return [_plain(each[1]) for each in found if each and not each[1].startswith("*args")]


def _plain(arguments: str) -> str:
    """One spelling for what pybind11 spells in several ways."""
    text = re.sub(r"^self: [\w.:]+(, )?", "", arguments)
    text = re.sub(r"\btensorrt_bindings\.tensorrt\.|\b(nvinfer1|nvonnxparser)::", "", text)
    text = re.sub(r"<(\w+)\.(\w+): \d+>", r"\1.\2", text)
    for ours, theirs in (
        ("int", r"typing\.SupportsInt"),
        ("buffer", r"typing_extensions\.Buffer"),
        ("capsule", r"typing_extensions\.CapsuleType"),
        ("list", r"collections\.abc\.Sequence|\bList\b"),
    ):
        text = re.sub(theirs, ours, text)
    return text.replace("ILogger::Severity", "ILogger.Severity")


def merge(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One table: what is the same in several versions stands there once, under their names."""
    known = [each["version"] for each in found]
    made: dict[str, Any] = {"versions": known}
    for part in ("classes", "enums"):
        made[part] = {}
        for name in dict.fromkeys(name for each in found for name in each[part]):
            members = dict.fromkeys(member for each in found for member in each[part].get(name, ()))
            versions = [each["version"] for each in found if name in each[part]]
            tables = [(each["version"], each[part].get(name, {})) for each in found]
            entries = {member: _by_version(member, tables) for member in members}
            made[part][name] = {"versions": " ".join(versions), "members": entries}
    functions = dict.fromkeys(name for each in found for name in each["functions"])
    made["functions"] = {
        name: _by_version(name, [(each["version"], each["functions"]) for each in found]) for name in functions
    }
    return made


def _by_version(member: str, found: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    versions: dict[str, list[str]] = {}
    for version, members in found:
        if member in members:
            versions.setdefault(json.dumps(members[member]), []).append(version)
    return {" ".join(names): json.loads(value) for value, names in versions.items()}


def written(table: dict[str, Any]) -> str:
    """A line for each member."""
    lines = ["{", f' "versions": {json.dumps(table["versions"])},']
    for part in ("classes", "enums"):
        lines.append(f' "{part}": {{')
        for place, (name, entry) in enumerate(table[part].items()):
            lines.append(f'  "{name}": {{"versions": "{entry["versions"]}", "members": {{')
            lines += _members(entry["members"], "   ")
            lines.append("  }}" + ("," if place < len(table[part]) - 1 else ""))
        lines.append(" },")
    lines += [' "functions": {', *_members(table["functions"], "  "), " }", "}"]
    return "\n".join(lines) + "\n"


def _members(members: dict[str, Any], indent: str) -> list[str]:
    lines = [f"{indent}{json.dumps(name)}: {json.dumps(value)}" for name, value in members.items()]
    return [line + ("," if place < len(lines) - 1 else "") for place, line in enumerate(lines)]


def main(wheels: list[str]) -> None:
    """Read wheels, oldest first, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = [api_of(unpacked(Path(wheel), Path(folder, str(place)))) for place, wheel in enumerate(wheels)]
    print(written(merge(found)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
