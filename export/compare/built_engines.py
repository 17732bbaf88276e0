"""Which of a bundle's TensorRT engines, and what they take."""

from __future__ import annotations

from pathlib import Path

from deepstitch.engine_manifest import ENGINE_MANIFEST, EngineManifest, built_engines
from deepstitch.errors import InputError
from deepstitch.export.compare.inputs import CaseInputs
from deepstitch.runtime.bundle import DECODER

__all__ = ["fits", "most_logits", "only_engines"]


def only_engines(bundle: Path) -> tuple[Path, EngineManifest]:
    """The folder of a bundle's engines and what it says of them.

    Raises:
        InputError: there are none, or several to choose from.
        BundleError: ``engine.json`` is damaged.
    """
    found = built_engines(bundle)
    if not found:
        raise InputError(f"{bundle}: there are no engines yet; make some with 'deepstitch build {bundle} --target …'")
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise InputError(
            f"{bundle}: there are several engines ({names}), and a script is for one; move the others away"
        )
    return found[0], EngineManifest.read(found[0] / ENGINE_MANIFEST)


def most_logits(built: EngineManifest) -> int:
    """Positions of a row whose logits one call of every profile gives."""
    return min(profile.shapes["logit_index"][-1][-1] for profile in built.graphs[DECODER].profiles)


def fits(built: EngineManifest, inputs: CaseInputs) -> bool:
    """Whether the engines are large enough for a case, its pictures in one call."""
    limits = built.limits
    longest = max(len(row.prompt) + len(row.decode_ids) for row in inputs.rows)
    patches = len(inputs.vision.pixel_values) if inputs.vision is not None else 0
    return len(inputs.rows) <= limits.batch and longest <= limits.max_context and patches <= limits.patches
