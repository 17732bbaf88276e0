"""Enums of this version."""

from __future__ import annotations

from ._api import ApiEnum, enum_of

BuilderFlag = enum_of("BuilderFlag")
DataType = enum_of("DataType")
ErrorCode = enum_of("ErrorCode")
ExecutionContextAllocationStrategy = enum_of("ExecutionContextAllocationStrategy")
LayerType = enum_of("LayerType")
MemoryPoolType = enum_of("MemoryPoolType")
NetworkDefinitionCreationFlag = enum_of("NetworkDefinitionCreationFlag")
OnnxParserFlag = enum_of("OnnxParserFlag")
PreviewFeature = enum_of("PreviewFeature")
ProfilingVerbosity = enum_of("ProfilingVerbosity")
TensorIOMode = enum_of("TensorIOMode")
TensorLocation = enum_of("TensorLocation")

Severity = ApiEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

# numpy's names of TensorRT's types, as far as this version has them
NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


def data_type(numpy_name: str) -> DataType:
    """TensorRT's type of that name; before 10 an engine holds int64 as int32.

    Raises:
        ValueError: this version has none.
    """
    name = next((ours for ours, theirs in NUMPY_NAMES.items() if theirs == numpy_name), "")
    if name == "INT64" and not hasattr(DataType, "INT64"):
        name = "INT32"
    if name not in DataType.__members__:
        raise ValueError(f"this TensorRT has no {numpy_name}")
    return DataType[name]
