"""Peak memory and time of an export at the published sizes, with weights as sparse files.

    python -m benchmarks.export_memory --shape 30b-a3b --mode reference --output
    benchmarks/results/export_memory_30b.json

``reference`` leaves the matrices in the checkpoint's files; ``copy`` streams all of them into the bundle, rounded to
integers where asked (61 GB of disk for 30B-A3B at fp16; ``--layers`` shortens the decoder, and the peak does not depend
on its length).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoints import shape_config, write_sparse_checkpoint
from benchmarks.common import run_child, write_report
from deepstitch.manifest import Manifest


def measure(shape: str, mode: str, weights: str, target: str, layers: int | None, scratch: Path) -> dict[str, object]:
    """Export one shape in a child process."""
    config = shape_config(shape)
    if layers is not None:
        config["text_config"]["num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        checkpoint, bundle = Path(folder, "checkpoint"), Path(folder, "bundle")
        total = write_sparse_checkpoint(config, checkpoint)
        flags = ["--by-reference"] if mode == "reference" else ["--weights", weights]
        command = [sys.executable, "-m", "deepstitch.cli", "export", str(checkpoint), "--target", target]
        child = run_child([*command, "-o", str(bundle), "--no-compare", *flags])
        manifest = Manifest.read(bundle)
        return {
            "shape": shape,
            "layers": config["text_config"]["num_hidden_layers"],
            "mode": mode,
            "weights": manifest.weights,
            "target": target,
            "checkpoint_gb": round(total / 1e9, 2),
            "parameters_billion": round(manifest.model.num_parameters / 1e9, 2),
            "active_billion": round(manifest.model.num_active_parameters / 1e9, 2),
            "decoder_nodes": manifest.graphs["decoder"].nodes,
            "seconds": round(child["seconds"], 1),
            "float32_mb_per_second": round(4 * manifest.model.num_parameters / 1e6 / child["seconds"]),
            "peak_rss_gb": round(child["peak_rss_bytes"] / 1e9, 2),
        }


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("30b-a3b", "235b-a22b"), default="30b-a3b")
    parser.add_argument("--mode", choices=("reference", "copy"), default="reference")
    parser.add_argument("--weights", choices=("fp16", "int8", "int4"), default="fp16", help="of a copy")
    parser.add_argument("--target", choices=("portable", "ort-cpu"), default="portable")
    parser.add_argument("--layers", type=int, help="shorten the decoder")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--output", type=Path, help="JSON report")
    arguments = parser.parse_args()
    result = measure(
        arguments.shape, arguments.mode, arguments.weights, arguments.target, arguments.layers, arguments.scratch
    )
    write_report("export_memory", {"result": json.loads(json.dumps(result))}, arguments.output)


if __name__ == "__main__":
    main()
