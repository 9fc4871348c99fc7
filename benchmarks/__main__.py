"""The `make bench` command: which measurements there are, and for how long.

    parts     environment, inference and training on one core each, and the bound that follows from them
    wire      bytes per agent step and microseconds per rollout, on real frames; what encryption costs
    system    the whole of `impala train` on this machine: steps/s, memory, lag, bytes, against its bound
    learners  samples/s of 1, 2, 4, 8 learners in a group, as far as there are cores
    fleet     the servers under hundreds of clients, with and without keys; `fleet --help`

Without a name the first three run. Machines are noisy: compare figures of one call, not of two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the results as JSON to ``--json``, if asked for."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"  # before torch is imported: all figures are per core
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["fleet"]:
        from benchmarks import fleet

        return fleet.main(words[1:])
    from benchmarks import learners, parts, system, wire
    from benchmarks.options import VARIANTS, Options

    usual = ("parts", "wire", "system")
    measurements = {
        "parts": parts.measure,
        "wire": wire.measure,
        "system": system.measure,
        "learners": learners.measure,
    }
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {', '.join(measurements)}; or fleet, alone"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each whole-system run (default 60)")
    parser.add_argument("--env", default="ALE/Pong-v5", help="what is played (default ALE/Pong-v5)")
    parser.add_argument(
        "--variants",
        default="shallow,nature",
        help=f"comma-separated, of {', '.join(VARIANTS)}, or all (default shallow,nature)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.names if name not in measurements]
    if unknown:
        parser.error(f"no measurement {unknown[0]!r}; allowed are {', '.join(measurements)}")
    variants = tuple(VARIANTS) if arguments.variants == "all" else tuple(arguments.variants.split(","))
    strange = [name for name in variants if name not in VARIANTS]
    if strange:
        parser.error(f"--variants: no variant {strange[0]!r}; allowed are {', '.join(VARIANTS)} and all")
    options = Options(env=arguments.env, variants=variants, seconds=arguments.seconds)
    results = {name: measurements[name](options) for name in arguments.names or usual}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
