"""One graph through TensorRT's parser and builder: from an ONNX file to the bytes of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepstitch.engine_manifest import EngineProfile
from deepstitch.errors import DeviceError, list_names
from deepstitch.export.contract import Contract
from deepstitch.export.tensorrt.build_progress import Progress
from deepstitch.export.tensorrt.precision import Precision, creation_flags, pin_layers
from deepstitch.export.tensorrt.timing_cache import TimingCache
from deepstitch.runtime.engine.tensorrt.api import TensorRT

__all__ = ["GraphSource", "plan_from_onnx"]

_REPORT = "'deepstitch --debug build' shows all that TensorRT says; please report it"
_NO_MEMORY = ("outofmemory", "out of memory", "memory allocation", "mem_alloc")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSource:
    """What an engine is made from.

    Attributes:
        name: of the graph.
        path: of its ONNX file; the weights lie beside it.
        contract: inputs and outputs as in the manifest.
        profiles: in the order of their numbers.
        precision: of its arithmetic.
        workspace: bytes of scratch memory that kernels may ask for.
    """

    name: str
    path: Path
    contract: Contract
    profiles: tuple[EngineProfile, ...]
    precision: Precision
    workspace: int


def plan_from_onnx(tensorrt: TensorRT, source: GraphSource, cache: TimingCache, progress: Progress) -> Any:
    """Build an engine; its bytes lie in memory of TensorRT's, as a buffer.

    Args:
        tensorrt: with the plugins loaded.
        source: of the engine.
        cache: is used, and gets what is measured.
        progress: is told.

    Raises:
        DeviceError: TensorRT does not parse or build the graph.
        KeyboardInterrupt: Ctrl-C came while it was building.
    """
    module, errors = tensorrt.module, tensorrt.logger.errors
    errors.clear()  # what was said before is not about this
    try:
        builder = module.Builder(tensorrt.logger)
    except TypeError:
        raise tensorrt.failure("makes no builder", "see what 'nvidia-smi' says about the card") from None
    network = builder.create_network(creation_flags(module))
    parser = module.OnnxParser(network, tensorrt.logger)
    if not parser.parse_from_file(str(source.path)):  # by its name: the weights beside it may be of any size
        raise _parser_refusal(tensorrt, source, parser)
    _check_edges(tensorrt, source, network)
    config = _configuration(tensorrt, source, builder)
    if source.precision.half:
        pin_layers(module, network)
    cache.attach(config)
    progress.attach(module, config)
    errors.clear()  # of a timing cache that was refused
    plan = builder.build_serialized_network(network, config)
    if progress.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise _builder_refusal(tensorrt, source)
    cache.take(config)
    return plan


def _configuration(tensorrt: TensorRT, source: GraphSource, builder: Any) -> Any:
    module = tensorrt.module
    config = builder.create_builder_config()
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, source.workspace)
    config.max_aux_streams = 0  # one stream: less memory, and what a CUDA graph captures
    source.precision.set_flags(module, config)
    for each in source.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in each.shapes.items():
            profile.set_shape(name, min=low, opt=usual, max=high)
        if config.add_optimization_profile(profile) < 0:
            raise tensorrt.failure(f"refuses the profile '{each.name}' of graph '{source.name}'", _REPORT)
    return config


def _check_edges(tensorrt: TensorRT, source: GraphSource, network: Any) -> None:
    """What TensorRT made of the graph has the inputs and outputs that the runtime binds."""
    made = [network.get_input(place) for place in range(network.num_inputs)]
    if deciding := [tensor.name for tensor in made if tensor.is_shape_tensor]:
        raise DeviceError(
            f"TensorRT {tensorrt.version} takes input {', '.join(deciding)} of graph '{source.name}' for sizes, not "
            f"for values; {_REPORT}"
        )
    found = {tensor.name for tensor in made}
    found |= {network.get_output(place).name for place in range(network.num_outputs)}
    if differing := found ^ {spec.name for side in source.contract for spec in side}:
        raise DeviceError(
            f"TensorRT {tensorrt.version} reads graph '{source.name}' with other inputs or outputs than the manifest "
            f"has: {list_names(differing)}; {_REPORT}"
        )


def _parser_refusal(tensorrt: TensorRT, source: GraphSource, parser: Any) -> DeviceError:
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    said = "; ".join(f"node {each.node()}: {' '.join(each.desc().split())}" for each in errors[:3])
    tensorrt.logger.errors.clear()
    return DeviceError(
        f"TensorRT {tensorrt.version} does not parse graph '{source.name}' ({said or 'without saying why'}); see what "
        "'deepstitch build --check' says about the bundle and the plugin library"
    )


def _builder_refusal(tensorrt: TensorRT, source: GraphSource) -> DeviceError:
    errors = tensorrt.logger.errors
    last = errors[-1].lower() if errors else ""  # kernels that were passed over may have lacked memory too
    remedy = _REPORT
    if any(words in last for words in _NO_MEMORY):
        remedy = (
            "the card's memory does not suffice for building: end other programs that use it, or make --prefill-chunk, "
            "--max-context, --batch or --image-patches smaller"
        )
    return tensorrt.failure(f"cannot build graph '{source.name}'", remedy)
