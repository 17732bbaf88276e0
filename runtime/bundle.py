"""A bundle folder, opened and checked: files against the manifest, graphs against the contract."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from deepstitch.errors import BundleError, list_names
from deepstitch.manifest import MANIFEST_NAME, Graph, Manifest, TensorSpec
from deepstitch.runtime.verify import verify_files, verify_level

__all__ = ["DECODER", "VISION_ENCODER", "Bundle", "require_graphs"]

DECODER = "decoder"
VISION_ENCODER = "vision_encoder"

# What this runtime can feed, by graph; the KV cache tensors follow a name pattern.
_INPUTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        DECODER: {
            "inputs_embeds": "float32",
            "position_ids": "int64",
            "deepstack_embeds": "float32",
            "deepstack_index": "int32",
            "past_lengths": "int32",
            "query_lengths": "int32",
            "logit_index": "int64",
        },
        VISION_ENCODER: {
            "pixel_values": "float32",
            "position_indices": "int64",
            "position_weights": "float32",
            "rotary_cos": "float32",
            "rotary_sin": "float32",
            "cu_seqlens": "int32",
        },
    }
)
_OUTPUTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        DECODER: {"logits": "float32"},
        VISION_ENCODER: {"image_embeds": "float32", "deepstack_embeds": "float32"},
    }
)
_SERVERS = MappingProxyType({DECODER: "language-server", VISION_ENCODER: "encode-server"})
_DEEPSTACK_INPUTS = frozenset({"deepstack_embeds", "deepstack_index"})
_CACHE_PREFIXES = ("past_key_values.", "present.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An intact bundle folder.

    Attributes:
        folder: where it lies.
        manifest: everything the runtime knows about the model.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        verify: str | None = None,
        progress: bool = True,
        graphs: Collection[str] | None = None,
    ) -> Bundle:
        """Read the manifest and check the files and the declared contract.

        Args:
            folder: the bundle folder.
            verify: ``auto``, ``full`` or ``size``, see :func:`deepstitch.runtime.verify.verify_level`.
            progress: show a bar while large files are hashed, if stderr is a terminal.
            graphs: those that are needed; None: all that the model has.

        Raises:
            BundleError: the folder is no bundle, or a damaged one, or one this version cannot run.
        """
        bundle = cls(folder=Path(folder), manifest=Manifest.read(folder))
        require_graphs(bundle.folder, bundle.manifest, graphs)
        verify_files(bundle.folder, bundle.manifest, verify_level(verify), progress=progress)
        bundle._check_manifest()
        return bundle

    def graph_path(self, name: str) -> Path:
        """The ONNX file of graph ``name``.

        Raises:
            BundleError: the bundle has no such graph.
        """
        return self.folder / self.graph(name).file

    def graph(self, name: str) -> Graph:
        """The contract of graph ``name``.

        Raises:
            BundleError: the bundle has no such graph.
        """
        require_graphs(self.folder, self.manifest, [name])
        return self.manifest.graphs[name]

    def check_graph(self, name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
        """Compare what a loaded graph really takes and gives with the manifest.

        Raises:
            BundleError: a tensor is missing, unexpected, or of another dtype or shape.
        """
        declared = self.graph(name)
        where = f"{self.folder / declared.file}"
        _compare_tensors(where, "input", _by_name(inputs), _by_name(declared.inputs))
        _compare_tensors(where, "output", _by_name(outputs), _by_name(declared.outputs))

    def _check_manifest(self) -> None:
        manifest = self.manifest
        for name in _graphs_of(manifest):
            if name in manifest.graphs:
                self._check_declared(name, manifest.graphs[name])
        for file in [graph.file for graph in manifest.graphs.values()] + [manifest.embedding.file]:
            if file not in manifest.files:
                raise BundleError(
                    f"{self.folder / MANIFEST_NAME}: '{file}' is used but has no entry in 'files'; "
                    "the manifest was edited, export again"
                )

    def _check_declared(self, name: str, graph: Graph) -> None:
        """Refuse a contract this runtime does not speak, naming both versions."""
        known_inputs = dict(_INPUTS[name])
        if self.manifest.model.num_deepstack == 0:
            known_inputs = {key: dtype for key, dtype in known_inputs.items() if key not in _DEEPSTACK_INPUTS}
        problem = _difference("input", graph.inputs, known_inputs)
        problem = problem or _difference("output", graph.outputs, _OUTPUTS[name])
        if problem:
            raise BundleError(
                f"{self.folder / graph.file}: {problem}; the graph comes from deepstitch "
                f"{self.manifest.deepstitch_version}, this is {_own_version()}: export the checkpoint again"
            )


def _graphs_of(manifest: Manifest) -> list[str]:
    """Those a model has."""
    return [DECODER] if manifest.vision is None else [DECODER, VISION_ENCODER]


def require_graphs(folder: Path, manifest: Manifest, graphs: Collection[str] | None = None) -> None:
    """Refuse a bundle that lacks a graph; None: all that the model has are needed.

    Raises:
        BundleError: it is one side of a split bundle, or was edited.
    """
    for name in _graphs_of(manifest) if graphs is None else graphs:
        if name in manifest.graphs:
            continue
        there = list(manifest.graphs)
        left_out = name in _graphs_of(manifest) and f"{name}.onnx" not in manifest.files  # else somebody edited it
        if left_out and len(there) == 1 and there[0] in _SERVERS:
            raise BundleError(
                f"{folder}: has no graph '{name}': it is one side of a split bundle, for 'deepstitch "
                f"{_SERVERS[there[0]]}'; use the other side, or the whole bundle"
            )
        raise BundleError(
            f"{folder}: the bundle has no graph '{name}', only {list_names(there)}; export the checkpoint again"
        )


def _by_name(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def _difference(kind: str, specs: Iterable[TensorSpec], known: Mapping[str, str]) -> str:
    """The first way in which ``specs``, cache tensors aside, are not the ``known`` names and dtypes."""
    named = {spec.name: spec for spec in specs if not spec.name.startswith(_CACHE_PREFIXES)}
    for name in named:
        if name not in known:
            return f"{kind} '{name}' is unknown here"
    for name, dtype in known.items():
        if name not in named:
            return f"{kind} '{name}' is missing"
        if named[name].dtype != dtype:
            return f"{kind} '{name}' is {named[name].dtype}, {dtype} is expected"
    return ""


def _compare_tensors(
    where: str, kind: str, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]
) -> None:
    remedy = "graph and manifest do not belong together, export the checkpoint again"
    for name in sorted(found.keys() ^ expected.keys()):
        state = "is not in the graph" if name in expected else "is not in the manifest"
        raise BundleError(f"{where}: {kind} '{name}' {state}; {remedy}")
    for name, spec in found.items():
        if spec.dtype != expected[name].dtype or not _same_shape(spec.shape, expected[name].shape):
            raise BundleError(
                f"{where}: {kind} '{name}' is {spec.dtype} {list(spec.shape)} in the graph, "
                f"{expected[name].dtype} {list(expected[name].shape)} in the manifest; {remedy}"
            )


def _same_shape(left: tuple[int | str, ...], right: tuple[int | str, ...]) -> bool:
    """Equal rank and equal numbers; the names of dynamic axes are free."""
    if len(left) != len(right):
        return False
    pairs = zip(left, right, strict=True)
    return all(a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in pairs)


def _own_version() -> str:
    from deepstitch import __version__

    return __version__
