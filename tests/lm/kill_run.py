"""Starts a run twenty times and kills it after a random time: python kill_run.py EXPERIMENT.toml CORPUS RUN.

Prints the newest checkpoint after each. The children are forks of a process that has loaded everything.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import runs

from coupled_adam.lm.checkpoint import latest_checkpoint

toml, corpus, run_dir = map(Path, sys.argv[1:])
rng = random.Random(0)
for _ in range(20):
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr
        runs.run(toml.read_text(), corpus, run_dir)
        os._exit(0)
    time.sleep(rng.uniform(0.5, 2.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = latest_checkpoint(run_dir / "checkpoints")
    print(newest.name if newest else "none", flush=True)
