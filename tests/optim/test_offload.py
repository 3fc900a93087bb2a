"""Shards on the CPU of a mesh of accelerators, which is what FSDP2's CPUOffloadPolicy gives an optimizer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jobs
import offload_jobs
import pytest
import torch
from in_process import program
from old_torch import averages_gradients

pytestmark = pytest.mark.long


EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"
WHOLE_ROWS = ("clipped 8bit", "tempered")
CASES = [(name, "rows") for name in jobs.OPTIMIZERS]
CASES += [(name, "columns") for name in jobs.OPTIMIZERS if name not in WHOLE_ROWS]


@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_offloaded_shards_step_as_those_of_a_mesh_of_cpus(processes, optimizer, layout) -> None:
    expected = processes(2).run(offload_jobs.stepped, optimizer, (layout,), offload=False)
    found = processes(2).run(offload_jobs.stepped, optimizer, (layout,), offload=True)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, x in other.items():
            assert one[name].device.type == "cpu" and torch.equal(one[name], x), name


def test_process_groups_that_cannot_send_from_the_cpu_are_named(processes) -> None:
    told, same = processes(2).run(offload_jobs.without_gloo)
    assert told == same and told.startswith("The process group (hpu:gloo) cannot communicate from the cpu, ")
    assert told.endswith('create it with init_process_group("cpu:gloo,hpu:gloo")')


def example(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *start, str(EXAMPLE), "--batch", "4", "--width", "16", *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=200)


def losses(run: subprocess.CompletedProcess[str]) -> list[float]:
    assert run.returncode == 0, run.stderr
    return [float(x) for x in re.findall(r"loss (\S+)", run.stdout)]


@averages_gradients
def test_the_example_offloads_and_resumes_without(tmp_path) -> None:
    checkpoint = ["--checkpoint", str(tmp_path)]
    offloaded = example("--cpu-offload", "--steps", "10", *checkpoint, processes=2)
    resumed = example("--steps", "20", *checkpoint)
    assert "shards and their optimizer state are on the cpu" in offloaded.stdout
    found = losses(offloaded) + losses(resumed)
    assert found == pytest.approx(losses(example("--steps", "20")), abs=2e-5) and len(found) == 2


def test_the_example_offloads_only_what_fsdp2_shards() -> None:
    refused = program(EXAMPLE, "--cpu-offload")
    assert refused.returncode == 2 and "torchrun" in refused.stderr.splitlines()[-1]
