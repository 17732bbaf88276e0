"""Sessions of ONNX Runtime that run whole on a card, or say why they do not."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import sys
from pathlib import Path

import onnxruntime

from deepstitch.errors import BundleError, DeviceError
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine.cuda import Cuda, OutOfDeviceMemory
from deepstitch.runtime.engine.ort import load_failure, tensor_specs

__all__ = ["open_session", "preload", "run_failure"]

_PROVIDER = "CUDAExecutionProvider"
_PASCAL_RELEASE = "1.20.2"  # the newest whose Linux package holds code for compute capability 6.1
_NOT_FOR_PASCAL = (1, 23)  # and from here on it has been seen to fail there
_EIGHT_BITS = (1, 22)  # before, MatMulNBits took them for four and said nothing
_VOLTA = 70
_REASON_LENGTH = 200
_FATAL_ONLY = 4
# Of CUDA 12 and cuDNN 9, each after those it needs.
_LIBRARIES = (
    *("libcudart", "libnvJitLink", "libnvrtc", "libcublasLt", "libcublas", "libcufft", "libcurand"),
    *("libcudnn_graph", "libcudnn_ops", "libcudnn_cnn", "libcudnn_adv", "libcudnn"),
)
_EXTRAS = (1, 21)  # the first release with extras for them
_PACKAGES = (
    *("nvidia-cuda-runtime-cu12", "nvidia-cublas-cu12", "nvidia-cufft-cu12", "nvidia-curand-cu12"),
    *("nvidia-cuda-nvrtc-cu12", "'nvidia-cudnn-cu12<9.11'"),
)
_MEMORY_SIGNS = ("out of memory", "Failed to allocate memory", "ALLOC_FAILED", "CUDA failure 2:")
_CODE_SIGNS = ("no kernel image", "invalid device function", "CUDA failure 209:", "CUDA failure 98:")
_FALLBACK_SIGN = "fallback to CPU EP has been explicitly disabled"


def open_session(bundle: Bundle, name: str, cuda: Cuda) -> onnxruntime.InferenceSession:
    """Load one graph; every node of it runs on the card.

    Args:
        bundle: an opened bundle.
        name: of the graph.
        cuda: the card, and the stream that all work goes to.

    Raises:
        DeviceError: this onnxruntime does not run on the card.
        BundleError: it refuses the graph, or would run some nodes on the CPU.
    """
    _check_package(cuda)
    _check_weights(bundle)
    path = str(bundle.graph_path(name))
    onnxruntime.set_default_logger_severity(_FATAL_ONLY)  # failures come as exceptions
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {
        "device_id": str(cuda.card.ordinal),
        "user_compute_stream": str(cuda.stream_handle),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",  # fp32 means fp32
    }
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(_PROVIDER, settings)], enable_fallback=False)
    except Exception as error:  # ONNX Runtime raises bare subclasses of Exception
        raise _session_failure(error, path, name, cuda) from None
    if session.get_providers()[:1] != [_PROVIDER]:
        raise _provider_failure(_missing_library() or "onnxruntime's log says why")
    bundle.check_graph(name, tensor_specs(session.get_inputs()), tensor_specs(session.get_outputs()))
    return session


def run_failure(error: Exception, cuda: Cuda) -> DeviceError:
    """What went wrong in a call."""
    reason = " ".join(str(error).split())
    found = _known_failure(reason, cuda)
    return found or DeviceError(f"onnxruntime failed on the card ({cuda.card.name}): {_tail(reason)}")


def _check_package(cuda: Cuda) -> None:
    """Refuse packages without CUDA, and those that have no code for the card.

    Raises:
        DeviceError: the installed one is such a package.
    """
    wanted = f"onnxruntime-gpu=={_PASCAL_RELEASE}" if cuda.card.sm < _VOLTA else "onnxruntime-gpu"
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"the installed onnxruntime {onnxruntime.__version__} has no CUDA kernels; take it out and install "
            f"another package of the same module: pip uninstall onnxruntime, then pip install {wanted}"
        )
    if cuda.card.sm < _VOLTA and _release() >= _NOT_FOR_PASCAL:
        raise DeviceError(
            f"onnxruntime-gpu {onnxruntime.__version__} has no code that runs on this card ({cuda.card.name}, compute "
            f"capability {cuda.card.sm / 10}): pip install {wanted}"
        )
    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        with contextlib.suppress(Exception):
            onnxruntime.preload_dlls()
    else:
        preload(Path(onnxruntime.__file__).parent.parent / "nvidia")


def _check_weights(bundle: Bundle) -> None:
    """Refuse integers that this release gets wrong.

    Raises:
        DeviceError: it does.
    """
    quantization = bundle.manifest.quantization
    formats = quantization.formats.values() if quantization is not None else ()
    if _release() < _EIGHT_BITS and any(each.startswith("int8") for each in formats):
        raise DeviceError(
            f"{bundle.folder}: holds int8 weights, which onnxruntime-gpu {onnxruntime.__version__} takes for "
            "four bits; pip install onnxruntime-gpu==1.22.0, or export with --weights int4, fp16 or fp32"
        )


def preload(packages: Path) -> None:
    """Load the libraries of NVIDIA's pip packages, so that those which need them find them by name.

    Args:
        packages: the folder ``nvidia`` of site-packages, if there is one.
    """
    for name in _LIBRARIES:
        for path in sorted(packages.glob(f"*/lib/{name}.so.*")):
            with contextlib.suppress(OSError):  # what is missing then is said by who needs it
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2])


def _session_failure(error: Exception, path: str, name: str, cuda: Cuda) -> DeviceError | BundleError:
    reason = " ".join(str(error).split())
    if _FALLBACK_SIGN in reason:
        missing = _missing_library()  # without its CUDA kernels, everything would fall back
        if missing:
            return _provider_failure(missing)
        return BundleError(
            f"{path}: onnxruntime {onnxruntime.__version__} has no CUDA kernel for some node of graph '{name}', and a "
            "CPU in between would cost more than it saves; export the checkpoint again with this deepstitch, or "
            "install a newer onnxruntime-gpu"
        )
    return _known_failure(reason, cuda) or BundleError(load_failure(name, path, error))


def _known_failure(reason: str, cuda: Cuda) -> DeviceError | None:
    card = cuda.card
    if any(sign in reason for sign in _MEMORY_SIGNS):
        return OutOfDeviceMemory(
            f"the card ({card.name}, {card.total_bytes / 2**30:.1f} GiB) has no memory for onnxruntime; stop other "
            "programs that use it, take shorter prompts or fewer pictures at once, or export with smaller --weights"
        )
    if any(sign in reason for sign in _CODE_SIGNS):
        return DeviceError(
            f"onnxruntime-gpu {onnxruntime.__version__} has no code for this card ({card.name}, compute capability "
            f"{card.sm / 10}): install a release that has, {_PASCAL_RELEASE} for compute capability 6.1"
        )
    return None


def _provider_failure(reason: str) -> DeviceError:
    extras = f"'onnxruntime-gpu[cuda,cudnn]=={onnxruntime.__version__}'"
    packages = extras if _release() >= _EXTRAS else " ".join(_PACKAGES)
    return DeviceError(
        f"onnxruntime-gpu {onnxruntime.__version__} cannot load its CUDA kernels ({reason}): pip install {packages}, "
        "or set LD_LIBRARY_PATH to the CUDA and cuDNN libraries it needs"
    )


def _missing_library() -> str:
    """What onnxruntime's CUDA kernels miss on this machine, empty if nothing; onnxruntime says so in a log only."""
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        return ""
    # in a process of its own, because outside of onnxruntime the library may end the process that loads it
    command = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"OSError: (.*cannot open shared object file.*)", output)
    return found[1] if found else ""


def _tail(reason: str) -> str:
    """What went wrong stands at the end, after C++ signatures."""
    return reason if len(reason) <= _REASON_LENGTH else "…" + reason[-_REASON_LENGTH:]
