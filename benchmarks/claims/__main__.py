"""``python -m benchmarks.claims --out DIR``: run the claims, as far as DIR has them not yet."""

import argparse
import os
from pathlib import Path

from benchmarks.claims import CLAIMS, report, runs
from bitkern.cli.options import positive


def main():
    parser = argparse.ArgumentParser("python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--claim", choices=CLAIMS, help="one of them (default: all)")
    parser.add_argument("--seeds", type=positive, help="default: as many as each claim says")
    parser.add_argument(
        "--processes", type=positive, default=len(os.sched_getaffinity(0)), help="default: cores"
    )
    parser.add_argument("--quick", action="store_true", help="a dry run of a few steps, one seed")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    names = [args.claim] if args.claim else list(CLAIMS)
    wanted = runs.keys(names, args.seeds or (1 if args.quick else None))
    # A dry run's lines are not results, so they have a file of their own.
    path = args.out / ("quick.jsonl" if args.quick else "runs.jsonl")
    lines = runs.run(wanted, path, args.processes, args.quick)
    report.write(report.summary(lines), args.out)
    print(f"{args.out / report.PAGE}")


if __name__ == "__main__":
    main()
