"""metrics.jsonl, the log of a run: one JSON object per line, one line per step."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from coupled_adam.errors import InputError
from coupled_adam.files import validated, write_text


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PydanticCustomError("number", "should be a finite number")
    return value


#: A figure in a file of ours: neither NaN nor infinite, neither text nor true.
Number = Annotated[int | float, PlainValidator(_number)]

#: What to do about a line that is damaged.
REMEDY = "delete that line: training does not use this log"


class MetricsLog:
    """The metrics.jsonl at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Read all complete lines; empty ones are skipped.

        Raises:
            InputError: the file cannot be read, or a line is no object of numbers with a ``step`` above that of the
                line before; the message names the line.
        """
        found: list[dict[str, Any]] = []
        for number, content in enumerate(self._lines(), start=1):
            if not content.endswith(b"\n") or not content.strip():
                continue  # the last line of a process that was killed, or what an editor has added
            name = f"{self.path}: line {number}"
            line = validated(name, content.rstrip(), dict[str, Number | None], REMEDY)
            step = line.get("step")
            if not isinstance(step, int) or step < 0:
                raise InputError(f"{name}: damaged (step: should be a whole number, got {step}); {REMEDY}")
            if found and step <= found[-1]["step"]:
                raise InputError(f"{name}: damaged (step {step} after step {found[-1]['step']}); {REMEDY}")
            found.append(line)
        return found

    def _lines(self) -> list[bytes]:
        try:
            return self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None

    def evaluations(self) -> list[dict[str, Any]]:
        """Read the lines that hold an evaluation."""
        return [line for line in self.read() if "validation_loss" in line]

    def cut_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that a run resumes from; all of it if ``step`` is 0."""
        kept = "".join(json.dumps(line) + "\n" for line in self.read() if line["step"] <= step and step > 0)
        if kept.encode() != b"".join(self._lines()) or not self.path.exists():
            write_text(self.path, kept)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Raises OSError naming the file and what to do, if the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written ({error.strerror}). The last checkpoint is intact: free some space, "
                "then rerun the same command to resume"
            ) from None
