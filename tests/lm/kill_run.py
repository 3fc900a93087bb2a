"""Starts a run twenty times and kills it at a random moment: python kill_run.py EXPERIMENT.toml CORPUS RUN.

Prints the step of the last line of metrics.jsonl after each. The children are forks of a process that has imported all
that they need and computed nothing: threads do not survive a fork.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import runs

from coupled_adam.lm.checkpoint import latest_checkpoint
from coupled_adam.lm.metrics_jsonl import MetricsLog

toml, corpus, run_dir = map(Path, sys.argv[1:])
rng, metrics = random.Random(0), MetricsLog(run_dir / "metrics.jsonl")
for _ in range(20):
    newest = latest_checkpoint(run_dir / "checkpoints")
    start = int(newest.name.removeprefix("step-")) if newest else 0
    # Most die some steps after they began, however long a step takes; a few before, while they load.
    further = rng.randint(1, 10)
    patience = rng.uniform(0.2, 1.5) if rng.random() < 0.15 else 60.0
    began, deadline = time.time_ns(), time.monotonic() + patience
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr
        runs.run(toml.read_text(), corpus, run_dir)
        os._exit(0)
    while time.monotonic() < deadline:
        if (
            metrics.path.exists()
            and metrics.path.stat().st_mtime_ns > began
            and max((line["step"] for line in metrics.read()), default=0) >= start + further
        ):
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines = metrics.read()
    print(lines[-1]["step"] if lines else 0, flush=True)
