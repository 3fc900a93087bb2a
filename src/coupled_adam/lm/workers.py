"""Batches of documents are encoded beside the reader, and, where that takes long, by a process for each core."""

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from coupled_adam.errors import InputError
from coupled_adam.lm.encoding import Encoded, Encoder
from coupled_adam.lm.tokenizer import read_tokenizer

Batch = TypeVar("Batch")

#: What a process runs. It gets the path of modules of the process that starts it.
PROGRAM = "import sys; sys.path[:] = {path!r}; from coupled_adam.lm.workers import serve; serve()"

#: Seconds of encoding in this process before others are started, if at least as much is left for them.
PROCESSES_AFTER = 2.0

#: Batches that are read ahead, besides those that are being encoded.
AHEAD = 2


def cores() -> int:
    """Return on how many cores documents are encoded: what the library ``tokenizers`` would make of its variables."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "f", "n", "0"):
        return 1
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("RAYON_NUM_THREADS", "")
    return min(int(wanted), available) if wanted.isdecimal() and int(wanted) else available


class Encoders:
    """Encodes batches in their order, in a thread beside the reader or in processes. A context: its end ends them.

    Processes, not threads: most of what ``tokenizers`` does around the encoding happens in one thread of a process.

    Args:
        encoder: for the work in this process.
        tokenizer: file of the same tokenizer, for the others.
        dtype: of the token IDs.
    """

    def __init__(self, encoder: Encoder, tokenizer: Path, dtype: np.dtype[Any]) -> None:
        self._encoder, self._tokenizer, self._dtype = encoder, tokenizer, dtype
        self._thread = ThreadPoolExecutor(1)
        self._processes: list[Process] = []
        self._idle = SimpleQueue[Process]()
        self._began: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.end()
        self._thread.shutdown(cancel_futures=True)

    def progressed(self, share: float | None) -> None:
        """Start processes, if that is worth it when ``share`` of the text is done; None if that is not known."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, share or 0.0
        began, before = self._began
        worth_it = now - began >= PROCESSES_AFTER and (share is None or 1 - share > share - before)
        if worth_it and cores() > 1 and not (self._processes or self._encoder.is_fast):
            self.start(cores())

    def start(self, count: int) -> None:
        """Leave the batches that are still to come to so many processes, as far as the system lets them start."""
        with contextlib.suppress(OSError):
            for _ in range(count):
                process = Process(self._encoder, self._tokenizer, self._dtype)
                self._idle.put(process)
                self._processes.append(process)
        if self._processes:
            self._thread.shutdown(wait=False)  # what it was given, it does
            self._thread = ThreadPoolExecutor(len(self._processes))

    def encode(self, batches: Iterable[Batch], texts: Callable[[Batch], list[str]]) -> Iterator[tuple[Batch, Encoded]]:
        """Yield each batch with what ``texts`` of it are encoded to. Raises InputError as ``Encoder.encode``."""
        waiting = deque[tuple[Batch, Future[Encoded]]]()
        for batch in batches:
            waiting.append((batch, self._thread.submit(self._encode, texts(batch))))
            if len(waiting) > AHEAD + len(self._processes):
                yield self._first(waiting)
        while waiting:
            yield self._first(waiting)

    @staticmethod
    def _first(waiting: "deque[tuple[Batch, Future[Encoded]]]") -> tuple[Batch, Encoded]:
        batch, found = waiting.popleft()
        return batch, found.result()

    def _encode(self, texts: list[str]) -> Encoded:
        if not self._processes:
            return self._encoder.encode(texts, self._dtype)
        process = self._idle.get()
        try:
            return process.encode(texts)
        finally:
            self._idle.put(process)


class Process:
    """Another process that encodes what it is sent. It ends with its standard input: with this process at the latest.

    Args:
        encoder: what it does.
        tokenizer: file of the tokenizer of ``encoder``.
        dtype: of the token IDs.
    """

    def __init__(self, encoder: Encoder, tokenizer: Path, dtype: np.dtype[Any]) -> None:
        one_core = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_core, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # an interrupt from the keyboard is for this process, which ends the others
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._what: tuple[Any, ...] | None = (tokenizer, encoder.end, encoder.name, dtype)

    def encode(self, texts: list[str]) -> Encoded:
        """Return what the process encodes texts to.

        Raises:
            InputError: as ``Encoder.encode``, or the process died.
        """
        try:
            if self._what:
                pickle.dump(self._what, self._to)
                self._what = None
            pickle.dump(texts, self._to, pickle.HIGHEST_PROTOCOL)
            self._to.flush()
            found: Encoded | InputError = pickle.load(self._from)
        except (OSError, EOFError, pickle.UnpicklingError, ValueError):
            raise InputError(self._death()) from None
        if isinstance(found, InputError):
            raise found
        return found

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        status = self._process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return (
            f"process {self._process.pid}, which encoded text, ended {how}; if memory was short, set RAYON_NUM_THREADS "
            f"to fewer than {cores()} processes; rerun the same command to resume"
        )

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                pipe.close()


def serve() -> None:
    """Encode what comes from standard input, to standard output, until it ends: the whole work of a ``Process``."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # whoever asked is gone
        tokenizer, end, name, dtype = pickle.load(requests)
        encoder: Encoder | None = None
        while True:
            texts = pickle.load(requests)
            try:
                encoder = encoder or Encoder(read_tokenizer(tokenizer), end, name)
                found: Encoded | InputError = encoder.encode(texts, dtype)
            except InputError as error:
                found = error
            pickle.dump(found, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
