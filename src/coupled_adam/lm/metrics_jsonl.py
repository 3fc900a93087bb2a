"""metrics.jsonl, the log of a run: one JSON object a line, one line a step."""

import json
from pathlib import Path
from typing import Any

from coupled_adam.errors import InputError
from coupled_adam.files import write_text


class MetricsLog:
    """The metrics.jsonl at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Read all complete lines. Raises InputError naming a damaged one."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                if line.endswith(b"\n"):
                    found.append(json.loads(line))
            except ValueError as error:  # of JSON, or of UTF-8
                raise InputError(f"{self.path}: line {number} is damaged ({error})") from None
        return found

    def evaluations(self) -> list[dict[str, Any]]:
        """Read the lines that hold an evaluation."""
        return [line for line in self.read() if "validation_loss" in line]

    def cut_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that a run resumes from; all of it if ``step`` is 0."""
        kept = [line for line in self.read() if line["step"] <= step and step > 0]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Raises OSError naming the file and what to do, if the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written ({error.strerror}). The last checkpoint is intact: make space, then "
                "rerun the same command to resume"
            ) from None
