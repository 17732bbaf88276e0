"""The builder: from a parsed network, profiles and a configuration to a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from ._api import MAJOR, VERSION, Object, State, fails, make, native
from ._base import Dims, IHostMemory, ILogger, Severity, say
from ._enums import BuilderFlag, MemoryPoolType, PreviewFeature, ProfilingVerbosity
from ._network import INetworkDefinition, is_strongly_typed, new_network
from ._plan import Plan, capability
from ._plugins import IPluginRegistry, get_plugin_registry

WEAK_TYPES = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4")
_STEPS = 4
_CACHE = "fake timing cache"


def _plain_property(name: str) -> property:
    def read(self: Object) -> object:
        return self._state.values.get(name)

    def write(self: Object, value: object) -> None:
        self._state.values[name] = value

    return property(read, write)


@native
class IOptimizationProfile(Object):
    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        corners = tuple(tuple(int(axis) for axis in corner) for corner in (min, opt, max))
        if len({len(each) for each in corners}) != 1 or any(
            not low <= usual <= high for low, usual, high in zip(*corners, strict=True)
        ):
            raise ValueError(f"Shapes provided for {input} do not satisfy min <= opt <= max: {corners}")
        self._state.shapes[input] = corners

    def get_shape(self, input: str) -> list[tuple[int, ...]]:
        return list(self._state.shapes[input])

    def __bool__(self) -> bool:
        return bool(self._state.shapes)


@native
class ITimingCache(Object):
    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps(self._state.entries).encode())

    def combine(self, input_cache: Object, ignore_mismatch: bool) -> bool:
        if input_cache._state.entries["version"] != self._state.entries["version"] and not ignore_mismatch:
            return False
        self._state.entries["timed"] = sorted({*self._state.entries["timed"], *input_cache._state.entries["timed"]})
        return True

    def reset(self) -> bool:
        self._state.entries["timed"] = []
        return True


@native
class IBuilderConfig(Object):
    # These are only remembered.
    builder_optimization_level = _plain_property("builder_optimization_level")
    max_aux_streams = _plain_property("max_aux_streams")
    max_workspace_size = _plain_property("max_workspace_size")
    plugins_to_serialize = _plain_property("plugins_to_serialize")
    profiling_verbosity = _plain_property("profiling_verbosity")
    progress_monitor = _plain_property("progress_monitor")

    def set_flag(self, flag: BuilderFlag) -> None:
        self._state.flags |= 1 << int(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._state.flags &= ~(1 << int(flag))

    def get_flag(self, flag: BuilderFlag) -> bool:
        return bool(self._state.flags >> int(flag) & 1)

    @property
    def flags(self) -> int:
        return self._state.flags

    @flags.setter
    def flags(self, value: int) -> None:
        self._state.flags = value

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._state.pools[pool] = pool_size

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self._state.pools.get(pool, 0)

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        self._state.preview[feature] = enable

    def get_preview_feature(self, feature: PreviewFeature) -> bool:
        return self._state.preview.get(feature, False)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile or fails("profile"):
            return -1
        self._state.profiles.append(profile)
        return len(self._state.profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._state.profiles)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        data = bytes(serialized_timing_cache)
        entries = {"what": _CACHE, "version": VERSION, "timed": []}
        if data:
            try:
                entries = json.loads(data)
            except ValueError:
                entries = {}
            if entries.get("what") != _CACHE:
                say(self._state.logger, Severity.ERROR, "Error Code 1: Serialization (Timing cache magic tag is wrong)")
                return None
        return make(ITimingCache, entries=entries)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._state.entries["version"] != VERSION and not ignore_mismatch:
            say(self._state.logger, Severity.WARNING, "The timing cache will not be used: it is of another TensorRT")
            return False
        self._state.cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._state.cache


@native
class Builder(Object):
    def __init__(self, logger: ILogger) -> None:
        if fails("driver"):
            say(logger, Severity.INTERNAL_ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._state = State(logger=logger, allocator=None, max_threads=1)

    @property
    def gpu_allocator(self) -> Object | None:
        return self._state.allocator

    @gpu_allocator.setter
    def gpu_allocator(self, value: Object | None) -> None:
        self._state.allocator = value

    @property
    def max_threads(self) -> int:
        return self._state.max_threads

    @max_threads.setter
    def max_threads(self, value: int) -> None:
        self._state.max_threads = value

    @property
    def platform_has_fast_fp16(self) -> bool:
        return capability() not in (61, 50, 52)

    @property
    def platform_has_fast_int8(self) -> bool:
        return capability() >= 61

    def get_plugin_registry(self) -> IPluginRegistry:
        return get_plugin_registry()

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return new_network(flags)

    def create_builder_config(self) -> IBuilderConfig:
        tf32 = 1 << int(BuilderFlag.TF32)
        values = {"profiling_verbosity": ProfilingVerbosity.LAYER_NAMES_ONLY}
        return make(IBuilderConfig, logger=self._state.logger, flags=tf32, pools={}, preview={}, profiles=[],
                    cache=None, values=values)  # fmt: skip

    def create_optimization_profile(self) -> IOptimizationProfile:
        return make(IOptimizationProfile, shapes={})

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig, kernel_text: object = None
    ) -> IHostMemory | None:
        problem = next(_problems(network, config), None)
        if problem:
            say(self._state.logger, Severity.ERROR, problem)
            return None
        say(self._state.logger, Severity.INFO, f"Detected {network.num_inputs} inputs")
        if not _steps(config, network.name):
            say(self._state.logger, Severity.ERROR, "Error Code 10: Internal Error (Build cancelled by the monitor)")
            return None
        plan = _plan(network, config)
        if config._state.cache is not None:
            timed = config._state.cache._state.entries["timed"]
            timed[:] = sorted({*timed, hashlib.sha256(plan.onnx).hexdigest()})
        return IHostMemory(plan.to_bytes())


def _problems(network: INetworkDefinition, config: IBuilderConfig) -> Iterator[str]:
    graph, state = network._state.graph, config._state
    if graph is None:
        yield "Error Code 4: Internal Error (Network must have at least one output)"
        return
    if is_strongly_typed(network):
        for name in WEAK_TYPES:
            if name in BuilderFlag.__members__ and config.get_flag(BuilderFlag[name]):
                yield f"Error Code 3: API Usage Error (k{name} is set for a strongly typed network)"
    dynamic = [each for each in graph.tensors if each.is_input and any(isinstance(axis, str) for axis in each.shape)]
    if dynamic and not state.profiles:
        yield (
            "Error Code 4: Internal Error (Network has dynamic or shape inputs, but no optimization profile has been "
            "defined.)"
        )
    for profile in state.profiles:
        for tensor in dynamic:
            corners = profile._state.shapes.get(tensor.name)
            if corners is None:
                yield f"Error Code 4: API Usage Error ({tensor.name}: optimization profile is missing values for shape)"
            elif any(not _agrees(tensor.shape, corner) for corner in corners):
                yield f"Error Code 4: API Usage Error ({tensor.name}: static dimension mismatch: {corners})"
        unknown = profile._state.shapes.keys() - {each.name for each in graph.tensors}
        if unknown:
            yield f"Error Code 4: API Usage Error (the network has no input {sorted(unknown)[0]})"
    if fails("build-memory"):
        yield "Error Code 2: OutOfMemory (Requested size was 4194304 bytes.)"
    if fails("build"):
        yield "Error Code 10: Internal Error (Could not find any implementation for node this one.)"


def _agrees(shape: tuple[int | str, ...], corner: tuple[int, ...]) -> bool:
    return len(shape) == len(corner) and all(isinstance(a, str) or a == b for a, b in zip(shape, corner, strict=True))


def _steps(config: IBuilderConfig, name: str) -> bool:
    """Report to the progress monitor; whether to go on."""
    monitor = config._state.values.get("progress_monitor")
    if monitor is None:
        return True
    phases = [("Building an engine from a network", None, 2), (f"Timing of {name}", "Building an engine", _STEPS)]
    for phase, parent, steps in phases:
        monitor.phase_start(phase, parent, steps)
        for step in range(steps):
            if not monitor.step_complete(phase, step):
                monitor.phase_finish(phase)
                return False
        monitor.phase_finish(phase)
    return True


def _plan(network: INetworkDefinition, config: IBuilderConfig) -> Plan:
    graph = network._state.graph
    workspace = config.get_memory_pool_limit(MemoryPoolType.WORKSPACE)
    return Plan(
        version=VERSION,
        sm=capability(),
        name=network.name,
        tensors=graph.tensors,
        profiles=tuple(dict(each._state.shapes) for each in config._state.profiles),
        plugins=graph.plugins,
        num_layers=network.num_layers,
        weight_bytes=graph.weight_bytes,
        device_memory=min(workspace or 1 << 20, 1 << 20),
        onnx_path=str(graph.path.resolve()),
        onnx=graph.data,
    )


assert MAJOR in (8, 10, 11), "of these the bindings were read"
