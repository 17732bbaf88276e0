"""Text of the scripts of :mod:`deepstitch.export.compare.polygraphy_script`, and the two ways they run graphs."""

from __future__ import annotations

from string import Template
from types import MappingProxyType

__all__ = ["ONNX_RUNTIME", "TEMPLATE", "TENSORRT"]

TEMPLATE = Template(
    '''\
"""Compares the graphs of a deepstitch bundle with saved outputs of a reference.

Needs: $needs
Every graph gets the reference's own inputs; the decoder keeps its KV cache from call to call of one case.
"""

${standard}import sys
from pathlib import Path

import numpy as np
${imports}from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.json import load_json
from polygraphy.logger import G_LOGGER

HERE = Path(__file__).resolve().parent
BUNDLE = HERE / $bundle
NAME = $name
GRAPHS = $graphs
CASES = $cases  # of each call
LEFT_OUT = $left_out  # cases that the engines were not built large enough for
# output: (error, whether it is relative to the largest magnitude, quantile of the errors it holds for)
LIMITS = $limits
HEADS, WIDTH, DTYPE = $heads, $width, $dtype  # of the KV cache
CACHE = [f"past_key_values.{layer}.{part}" for layer in range($layers) for part in ("key", "value")]

$runners

def run_decoder(runner, calls):
    """Logits of every call. A call over empty rows starts a new cache, the others continue the last one."""
    capacity = max(int(call["past_lengths"].max()) + call["inputs_embeds"].shape[1] for call in calls)
    cache = {}
    for call in calls:
        if not call["past_lengths"].any():
            shape = (len(call["past_lengths"]), HEADS, capacity, WIDTH)
            cache = {name: np.zeros(shape, DTYPE) for name in CACHE}
        outputs = infer(runner, {**call, **cache})
        cache = {name: outputs[name.replace("past_key_values.", "present.")] for name in CACHE}
        yield {"logits": outputs["logits"]}


def compare(graph):
    """Whether every call of a graph is within its limits."""
    calls = load_json(str(HERE / f"{NAME}.{graph}.inputs.json"))
    reference = RunResults.load(str(HERE / f"{NAME}.{graph}.reference.json"))["reference"]
    passed = True
    with open_runner(graph) as runner:
        outputs = run_decoder(runner, calls) if graph == "decoder" else (infer(runner, call) for call in calls)
        for number, (actual, expected) in enumerate(zip(outputs, reference)):
            limits, quantiles = {}, {}
            for name, array in expected.items():
                value, relative, quantiles[name] = LIMITS[name]
                limits[name] = value * float(np.abs(array).max()) if relative else value
            results = RunResults()
            results.add([dict(actual)], runner_name=graph)
            results.add([dict(expected.items())], runner_name="reference")
            function = SimpleCompareFunc(
                atol=limits, rtol=0.0, check_error_stat="quantile", error_quantile=quantiles
            )
            good = bool(Comparator.compare_accuracy(results, compare_func=function))
            print(f"{graph} call {number} of case {CASES[graph][number]}: {'passed' if good else 'FAILED'}")
            passed = passed and good
    return passed


if __name__ == "__main__":
    with G_LOGGER.verbosity(G_LOGGER.ERROR):  # without this line Polygraphy shows statistics of every output
        passed = [compare(graph) for graph in GRAPHS]
    for case in LEFT_OUT:
        print(f"case {case} is left out: the engines are too small for it")
    sys.exit(0 if all(passed) else 1)
'''
)

ONNX_RUNTIME = MappingProxyType(
    {
        "needs": "pip install polygraphy onnxruntime numpy",
        "standard": "",
        "imports": """\
import onnxruntime
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
""",
        "runners": '''
def open_runner(graph):
    """A graph in ONNX Runtime."""
    onnxruntime.set_default_logger_severity(3)
    return OnnxrtRunner(SessionFromOnnx(str(BUNDLE / GRAPHS[graph]), providers=["cpu"]), name=graph)


def infer(runner, call):
    """Outputs of one call."""
    return runner.infer(call)
''',
    }
)

TENSORRT = MappingProxyType(
    {
        "standard": "import ctypes\n",
        "needs": "pip install polygraphy numpy, the TensorRT the engines were built with, and their card",
        "imports": """\
import tensorrt
from polygraphy.backend.common import BytesFromPath
from polygraphy.backend.trt import EngineFromBytes, TrtRunner, get_trt_logger
""",
        "runners": '''
def open_runner(graph):
    """An engine; its decoder has one profile for prompts and one for single tokens."""
    return TrtRunner(EngineFromBytes(BytesFromPath(str(BUNDLE / GRAPHS[graph]))), name=graph)


def infer(runner, call):
    """Outputs of one call, in the profile that is for it, with inputs of the types the engine has."""
    if "inputs_embeds" in call:
        runner.set_profile(1 if call["inputs_embeds"].shape[1] == 1 else 0)
    kinds = {name: kind.numpy() for name, (kind, _) in runner.get_input_metadata(use_numpy_dtypes=False).items()}
    outputs = runner.infer({name: np.asarray(array).astype(kinds[name], copy=False) for name, array in call.items()})
    return {name: np.array(array) for name, array in outputs.items()}  # the runner uses its memory again


def load_plugins(library):
    """Before any engine is read. The library lists its plugins to TensorRT: opened by ctypes, it adds none."""
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        failed = "no libcuda.so.1"
    if failed:  # TensorRT 8.6 would crash
        sys.exit(f"there is no NVIDIA driver that works here: {failed}")
    get_trt_logger()
    if library is not None and tensorrt.get_plugin_registry().load_library(str(BUNDLE / library)) is None:
        sys.exit(f"TensorRT {tensorrt.__version__} does not load {BUNDLE / library}")


load_plugins(PLUGIN_FILE)
''',
    }
)
