"""Real processes that run functions together, started once for all tests of a module."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Seconds after which a collective that others do not join is an error.
PATIENCE = 120

#: What the processes share instead of importing it again: they are forks of a server that has computed nothing.
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "coupled_adam.evaluation.stages",
    "coupled_adam.lm.train",
    "coupled_adam.optim.backends.cpu_kernels",
]


class Processes:
    """``count`` processes on gloo, one thread each. ``run(f, *args)`` calls f in all of them."""

    def __init__(self, count: int) -> None:
        self.count, self._started = count, False

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._tasks = [context.SimpleQueue() for _ in range(self.count)]
        self._results = context.Queue()
        arguments = (self._folder.name, self.count, self._tasks, self._results)
        self._context = mp.start_processes(_serve, arguments, self.count, join=False, start_method="forkserver")
        self._started = True

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """The results by rank. An error in any process is raised here, with its traceback."""
        if not self._started:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, args, kwargs))
        results: dict[int, Any] = {}
        while len(results) < self.count:
            rank, result, error = self._results.get(timeout=2 * PATIENCE)
            if error:
                self.stop()
                raise AssertionError(f"rank {rank} of {self.count}:\n{error}")
            results[rank] = result
        return [results[rank] for rank in range(self.count)]

    def stop(self) -> None:
        if self._started:
            for process in self._context.processes:
                process.kill()
                process.join()
            self._folder.cleanup()
            self._started = False


def _serve(rank: int, directory: str, count: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        function, args, kwargs = tasks[rank].get()
        try:
            results.put((rank, function(*args, **kwargs), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
