"""A run directory of somebody else runs no code, wherever in its checkpoint that lies."""

import dataclasses
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_experiment
from in_process import command
from paragraphs import paragraphs
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from coupled_adam.errors import InputError
from coupled_adam.files import checksums, write_sealed
from coupled_adam.lm.checkpoint import latest_checkpoint
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import open_run
from coupled_adam.lm.sources import TextFiles
from coupled_adam.lm.train import train


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.mkdir, (self.path,)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two of its four steps, beside its corpus."""
    directory = tmp_path_factory.mktemp("honest")
    (directory / "text.txt").write_text(paragraphs(200), encoding="utf-8")
    experiment = tiny_experiment().with_values(train__steps=2, train__checkpoint_every=2)
    corpus = prepare(TextFiles(directory / "text.txt"), experiment.data, directory / "corpus")
    train(experiment, corpus, directory / "run", lambda model, last: {})
    for name in ("experiment.toml", "environment.json"):  # it has two more steps to go
        file = directory / "run" / name
        file.write_text(file.read_text().replace("steps = 2\n", "steps = 4\n"))
    environment = json.loads((directory / "run" / "environment.json").read_text())
    del environment["sha256"]
    environment["experiment"]["train"]["steps"] = 4
    write_sealed(directory / "run" / "environment.json", environment)
    return directory


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest / "run", tmp_path / "run"))


def forge(run: Path, payload: bytes, position: str) -> None:
    """Has the entry whose name begins with ``position`` be bytes, those of ``payload``; all checksums are right."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    description, data = checkpoint / "dcp" / ".metadata", checkpoint / "dcp" / "__0_0.distcp"
    metadata: Metadata = pickle.loads(description.read_bytes())
    if position == ".metadata":
        description.write_bytes(payload)
    else:
        name = next(name for name in metadata.state_dict_metadata if name.startswith(position))
        index = next(index for index in metadata.storage_data if index.fqn == name)
        stored = metadata.storage_data.pop(index)
        index = dataclasses.replace(index, offset=None, index=None)
        place = dataclasses.replace(stored, offset=data.stat().st_size, length=len(payload))
        metadata.storage_data[index], metadata.state_dict_metadata[name] = place, BytesStorageMetadata()
        with data.open("ab") as file:
            file.write(payload)
        description.write_bytes(pickle.dumps(metadata))
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"]
    write_sealed(checkpoint / "state.json", {**state, "checksums": checksums(checkpoint, [description, data])})


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


POSITIONS = ("optimizer.param_groups", "optimizer.state", "model.head", "model.token_embedding", ".metadata")


@pytest.mark.parametrize("form", [pickle.dumps, saved], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("position", POSITIONS)
def test_no_command_runs_what_a_checkpoint_carries(
    position: str, form: Callable[[object], bytes], run: Path, honest: Path, tmp_path: Path
) -> None:
    forge(run, form(Payload(tmp_path / "ran")), position)
    for arguments in (
        ["train", run / "experiment.toml", "--data", honest / "corpus", "--out", run],
        ["evaluate", run, "--only", "embeddings"],
        ["export", run, "--out", tmp_path / "exported"],
        ["audit", run],
    ):
        result = command(*arguments)
        assert not (tmp_path / "ran").exists(), arguments
        assert "Traceback" not in result.stderr
        if result.returncode or arguments[0] == "train":
            assert result.returncode == 2
            assert "damaged" in result.stderr or "this checkpoint contains no" in result.stderr


def test_the_payload_would_run_where_nothing_guards(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_description_that_names_other_files_is_refused(run: Path, honest: Path) -> None:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    description = checkpoint / "dcp" / ".metadata"
    metadata: Metadata = pickle.loads(description.read_bytes())
    index, stored = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = dataclasses.replace(stored, relative_path="../../../secret")
    forge(run, pickle.dumps(metadata), ".metadata")
    with pytest.raises(InputError, match=r"damaged .*\.\./secret is not a file of this checkpoint"):
        open_run(run, honest / "corpus").model()
