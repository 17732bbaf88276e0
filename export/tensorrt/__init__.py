"""TensorRT engines: checked and planned without TensorRT and without a GPU, then built with both."""

from deepstitch.export.tensorrt.build_check import BuildCheck, check_build, default_sm, parser_of
from deepstitch.export.tensorrt.device import memory_of_card, parse_memory
from deepstitch.export.tensorrt.profiles import Limits
from deepstitch.export.tensorrt.subject import Stored, Subject

__all__ = [
    "BuildCheck",
    "Limits",
    "Stored",
    "Subject",
    "check_build",
    "default_sm",
    "memory_of_card",
    "parse_memory",
    "parser_of",
]
