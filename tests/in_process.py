"""Programs called in the process of the tests, which saves the import of torch: what they print, their exit status."""

import contextlib
import io
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from coupled_adam import cli


def called(function: Callable[[], object], *arguments: object) -> subprocess.CompletedProcess[str]:
    """What ``function`` does as a program with these arguments."""
    argv = ["program", *map(str, arguments)]
    out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``coupled-adam`` with these arguments."""
    return called(cli.main, *arguments)


def program(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A file of Python with these arguments."""
    return called(lambda: runpy.run_path(str(path), run_name="__main__"), *arguments)
