"""Programs called in the process of the tests, which saves the import of torch: what they print, their exit status."""

import contextlib
import io
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from coupled_adam.__main__ import main


def called(
    function: Callable[[], object], *arguments: object, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """What ``function`` does as a program with these arguments, whose output goes to files of that encoding."""
    argv = ["program", *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="\n", write_through=True) for _ in range(2))
    code, threads, handler = 0, torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)  # as a program may, and examples/train_mnist.py does
    written = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]
    return subprocess.CompletedProcess(argv, code, *written)


def command(*arguments: object, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """``coupled-adam`` with these arguments."""
    return called(main, *arguments, encoding=encoding)


def program(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A file of Python with these arguments."""
    return called(lambda: runpy.run_path(str(path), run_name="__main__"), *arguments)
