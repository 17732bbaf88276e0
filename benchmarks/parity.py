"""The sample model's bundles against transformers: largest logits error and agreement over the whole case matrix.

python -m benchmarks.parity --output benchmarks/results/parity_sample.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import write_report
from deepstitch.export import ExportConfig, export_checkpoint
from deepstitch.export.compare import compare_bundle
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.runtime.bundle import Bundle

BUNDLES = (("portable", "fp32"), ("ort-cpu", "fp32"), ("ort-cpu", "fp16"))


def measure(target: str, weights: str, folder: Path) -> dict[str, Any]:
    """Export and compare one bundle."""
    output = folder / f"{target}-{weights}"
    export_checkpoint(
        ExportConfig(checkpoint=CHECKPOINT, output=output, target=target, weights=weights, progress=False)
    )
    found = compare_bundle(Bundle.open(output), against="transformers", progress=False)
    logits = [result for result in found.results if result.argmax_agreement is not None]
    rows = sum(result.rows for result in logits)
    agreeing = sum(round((result.argmax_agreement or 0) * result.rows) for result in logits)
    return {
        "target": target,
        "weights": weights,
        "passed": found.passed,
        "cases": len({result.case for result in found.results}),
        "logits_max_abs": max(result.max_abs for result in logits),
        "stages_max_rel": max(result.max_rel for result in found.results),
        "argmax_agreement": f"{agreeing}/{rows}",
    }


def main() -> None:
    """Measure all bundles and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON report")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        write_report("parity", {"results": [measure(*each, Path(folder)) for each in BUNDLES]}, output)


if __name__ == "__main__":
    main()
