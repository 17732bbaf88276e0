"""TensorRT engines: what can be checked and planned before building, without TensorRT and without a GPU."""

from deepstitch.export.tensorrt.build_check import BuildCheck, check_build, parser_of
from deepstitch.export.tensorrt.device import memory_of_card, parse_memory
from deepstitch.export.tensorrt.profiles import Limits
from deepstitch.export.tensorrt.subject import Stored, Subject

__all__ = [
    "BuildCheck",
    "Limits",
    "Stored",
    "Subject",
    "check_build",
    "memory_of_card",
    "parse_memory",
    "parser_of",
]
