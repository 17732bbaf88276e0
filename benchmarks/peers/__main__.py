"""Every installed runtime on the same random weights, in one run.

    python -m benchmarks.peers --work WORK --json result.json --markdown result.md --plot result.png
    python -m benchmarks.peers --work WORK --quick

Builds random checkpoints (once, in WORK), lets each runtime's documented settings compete in a short pre-run, then
measures in rounds: every case in a process of its own, runtimes in turn, medians over the rounds. A process during
which anything else used 4 % of the cores or more is repeated, and left out of the medians where a quiet one exists. A
runtime that cannot run a case is listed with its error. Its own Python is named by --peer-python NAME=PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.checkpoints import SHAPES
from benchmarks.peers.figures import FIGURES, select
from benchmarks.peers.peers import PEERS, own_variant
from benchmarks.peers.prepare import Workshop
from benchmarks.peers.report import markdown
from benchmarks.peers.session import Plan, Session

_QUICK_FIGURES = ["prefill_128", "decode_64", "image_512x512", "first_token", "load", "memory", "quality"]


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and their conversions")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["mid", "slice", "dense"])
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(32, 16, 8, 4), default=[8, 4])
    parser.add_argument("--variants", nargs="+", help="only variants of these names, such as int8 Q8_0")
    parser.add_argument("--figures", nargs="+", help=f"names or beginnings of them: {', '.join(FIGURES)}")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--slow-repeats",
        type=int,
        default=1,
        help="rounds for runtimes without integer weights, which take minutes each",
    )
    parser.add_argument("--retries", type=int, default=2, help="repeat a disturbed process this often")
    parser.add_argument("--noise", type=float, default=0.04, help="share of the cores that counts as disturbed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a process may take")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="flags of our export; a new name adds a variant: --export 'int8-kv16=--weights int8 --kv-cache fp16'",
    )
    parser.add_argument(
        "--settings", choices=("all", "few"), default="all", help="how many settings compete in the pre-run"
    )
    parser.add_argument("--quick", action="store_true", help="one round of mid, fewer figures and settings")
    parser.add_argument("--json", type=Path, help="where results go, after each round")
    parser.add_argument("--markdown", type=Path, help="where the table goes; otherwise stdout")
    parser.add_argument("--plot", type=Path, help="where a plot goes (needs matplotlib)")
    return parser


def _pairs(given: list[str], option: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    pairs = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            parser.error(f"{option} {each}: expected NAME=VALUE")
        pairs[name] = value
    return pairs


def main() -> None:
    """Parse arguments, measure, report."""
    parser = _arguments()
    given = parser.parse_args()
    pythons = _pairs(given.peer_python, "--peer-python", parser)
    for name in pythons.keys() - PEERS.keys():
        parser.error(f"--peer-python {name}: there are {', '.join(PEERS)}")
    try:
        figures = select(given.figures or (_QUICK_FIGURES if given.quick else None))
    except ValueError as error:
        parser.error(str(error))
    flags = {name: tuple(value.split()) for name, value in _pairs(given.export, "--export", parser).items()}
    workshop = Workshop(
        work=given.work.resolve(),
        pythons={name: pythons.get(name, sys.executable) for name in PEERS},
        export_flags=flags,
        threads=given.threads,
        limit_seconds=4 * given.limit,
    )
    plan = Plan(
        shapes=tuple(given.shapes if not given.quick else given.shapes[:1]),
        peers=tuple(given.peers),
        bits=tuple(given.bits),
        variants=tuple(given.variants) if given.variants else None,
        own_variants=tuple(own_variant(name, value) for name, value in flags.items()),
        figures=tuple(figures),
        repeats=1 if given.quick else given.repeats,
        slow_repeats=given.slow_repeats,
        retries=0 if given.quick else given.retries,
        noise_limit=given.noise,
        limit_seconds=given.limit,
        quick=given.quick or given.settings == "few",
    )
    session = Session(plan, workshop, given.json)
    report = session.run()
    table = markdown(report)
    if given.markdown:
        given.markdown.write_text(table, "utf-8")
    else:
        sys.stdout.write(table)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if given.plot:
        from benchmarks.peers.plot import draw

        draw(report, given.plot)


if __name__ == "__main__":
    main()
