"""`python -m benchmarks.stability`: trains, edits, measures and draws; what is there already is not done again."""

from __future__ import annotations

import argparse
import os

from benchmarks.stability.runs import TRAINED, in_processes, measure, points, train

STAGES = ("train", "measure", "report")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.stability", description=__doc__)
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES, help="Those to do; all if not given.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes of one thread each.")
    arguments = parser.parse_args()
    if "train" in arguments.stages:
        in_processes(arguments.workers, train, TRAINED)
    if "measure" in arguments.stages:
        tasks = [(point, *part) for point in points() for part in point.parts()]
        in_processes(arguments.workers, measure, tasks)
    if "report" in arguments.stages:
        from benchmarks.stability.report import write

        write()


if __name__ == "__main__":
    main()
