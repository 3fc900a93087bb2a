"""Run the benchmarks one after the other, and write what they measure to docs/results/benchmarks.

    python benchmarks/all.py                          # all of them: about a quarter of an hour on two cores
    python benchmarks/all.py optimizer_step training  # these
    python benchmarks/all.py --missing                # what this machine has no complete file of: goes on after Ctrl-C
    python tools/evidence.py                          # then: the tables of the docs

Nothing else should run on the machine. Each writes RUN.MACHINE.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import harness
import torch

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results" / "benchmarks"

#: Programs and their arguments, by the name of their block in the docs.
RUNS: dict[str, list[str]] = {
    "optimizer_step": ["optimizer_step.py", "--rounds", "8"],
    "training": ["train_throughput.py", "--rounds", "4"],
    "embedding_metrics": ["embedding_metrics.py"],
    "embedding_health": ["embedding_metrics.py", "--live", "--rounds", "7"],
    "embedding_health_small": [
        *("embedding_metrics.py", "--live", "--rounds", "99", "--vocabulary", "8192", "--width", "128")
    ],
    "prepare": ["prepare.py"],
    "prepare_by_processes": [
        "prepare.py",
        "--megabytes",
        "30",
        "--rounds",
        "2",
        "--without-fastokens",
        "--workers",
        "1,2",
    ],
    "distributed_step": ["distributed_step.py"],
    "gpu_step": ["gpu_step.py"],
}
ON_GPUS = ("gpu_step",)


def machine() -> str:
    """Return a name of this machine for files."""
    about = f"{harness.processor()} {os.cpu_count()} cpus"
    return re.sub(r"[^a-z0-9]+", "-", about.lower()).strip("-")


def complete(path: Path) -> bool:
    return path.exists() and bool(json.loads(path.read_text("utf-8"))["complete"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--missing", action="store_true", help="leave out those with a complete file")
    parser.add_argument("--machine", default=machine(), help="its name in the files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(default: docs/results/benchmarks)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.runs) - set(RUNS)):
        parser.error(f"no run {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if not re.fullmatch(r"[\w-]+", arguments.machine):
        parser.error(f"--machine {arguments.machine!r} must be letters, digits, - and _: it is part of file names")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.runs or RUNS:
        program, *given = RUNS[name]
        path = arguments.out / f"{name}.{arguments.machine}.json"
        if name in ON_GPUS and not torch.cuda.is_available():
            print(f"== {name}: left out, there is no GPU")
        elif arguments.missing and complete(path):
            print(f"== {name}: left out, {path.name} is there")
        else:
            print(f"== {name}", flush=True)
            began = time.monotonic()
            done = subprocess.run([sys.executable, HERE / program, *given, "--json", path])
            print(f"== {name}: {time.monotonic() - began:.0f} s, {path.name}", flush=True)
            failed += [name] if done.returncode else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
