"""What a centered copy of a model directory consists of: nothing that lies outside of the model."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coupled_adam.audit.centering import center
from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.errors import InputError

SECRET = b"a private key"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An untied model of two matrices, and private files beside it."""
    (directory := tmp_path / "cloned" / "model").mkdir(parents=True)
    torch.manual_seed(0)
    matrices = {name: torch.randn(40, 8) + 1 for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(matrices, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    (directory / "notes").mkdir()
    (directory / "notes" / "README.md").write_text("kept")
    (keys := tmp_path / "keys").mkdir()
    (keys / "id").write_bytes(SECRET)
    return directory


def loop(place: Path) -> None:
    place.symlink_to("other")
    (place.parent / "other").symlink_to(place.name)


def bound_socket(place: Path) -> None:
    before = Path.cwd()
    os.chdir(place.parent)  # the name of a socket has at most a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(place.name)
    finally:
        os.chdir(before)


def git_config(place: Path) -> None:
    (git := place.parent / ".git").mkdir()
    (git / "config").write_bytes(SECRET)
    place.symlink_to(".git/config")


@pytest.mark.parametrize("folder", [".", "notes"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda place: place.symlink_to(place.parents[-3] / "etc"), "a broken link"),
        (lambda place: place.symlink_to(place.parent), "a link to a directory"),
        (lambda place: place.symlink_to(place.parent.parent), "a link to a directory"),
        (loop, "a broken link or a link loop|a link loop"),
        (lambda place: place.symlink_to("/dev/zero"), "neither a file nor a directory"),
        (os.mkfifo, "neither a file nor a directory"),
        (bound_socket, "neither a file nor a directory"),
        (git_config, "a link to a file outside the model"),
    ],
    ids=["dangling", "itself", "parent", "loop", "device", "pipe", "socket", "hidden"],
)
def test_what_leads_out_of_a_model_is_named_before_anything_is_written(
    make: Callable[[Path], object], reason: str, folder: str, model: Path, tmp_path: Path
) -> None:
    make(model / folder / "assets")
    with pytest.raises(InputError, match=rf"(assets|other): not copied: ({reason})") as error:
        center(read_embeddings(str(model)), tmp_path / "copy")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert {path.name for path in tmp_path.iterdir()} == {"cloned", "keys"}


@pytest.mark.parametrize("target", ["keys", "keys/id", "cloned/id"])
@pytest.mark.parametrize("relative", [False, True])
def test_private_files_do_not_reach_the_copy(target: str, relative: bool, model: Path, tmp_path: Path) -> None:
    (tmp_path / "cloned" / "id").write_bytes(SECRET)
    (model / "assets").symlink_to(Path("../..") / target if relative else tmp_path / target)
    with pytest.raises(InputError, match="assets: not copied: a link to a"):
        center(read_embeddings(str(model)), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_links_within_a_model_become_files(model: Path, tmp_path: Path) -> None:
    (model / "LICENSE").symlink_to("notes/README.md")
    (tmp_path / "name").symlink_to(model)
    center(read_embeddings(str(tmp_path / "name")), tmp_path / "copy")
    assert (tmp_path / "copy" / "LICENSE").read_text() == "kept" and not (tmp_path / "copy" / "LICENSE").is_symlink()
    assert (tmp_path / "copy" / "notes" / "README.md").read_text() == "kept"


def test_a_snapshot_of_the_cache_of_the_hub_is_copied_and_left_as_it_was(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    (blobs := cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    for number, path in enumerate(sorted(p for p in model.rglob("*") if p.is_file())):
        place = snapshot / path.relative_to(model)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{number}")
        place.symlink_to(os.path.relpath(blobs / f"{number}", place.parent))
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    result = center(read_embeddings(str(snapshot)), tmp_path / "copy")
    assert load_file(result.path / "model.safetensors")["lm_head.weight"].mean(0).abs().max() < 1e-6
    assert {path: path.read_bytes() for path in blobs.iterdir()} == before
    assert not any(path.is_symlink() for path in result.path.rglob("*"))
    assert (result.path / "notes" / "README.md").read_text() == "kept"


def test_a_clone_that_looks_like_a_snapshot_gets_nothing_through_its_blobs(model: Path, tmp_path: Path) -> None:
    (clone := tmp_path / "clone" / "snapshots").mkdir(parents=True)
    model.rename(clone / "0123")
    (tmp_path / "clone" / "blobs").symlink_to(tmp_path / "keys")
    (clone / "0123" / "assets").symlink_to("../../blobs/id")
    with pytest.raises(InputError, match="assets: not copied: a link to a file outside the model"):
        center(read_embeddings(str(clone / "0123")), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_unreadable_file_is_named_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "README.md")  # root may read everything
    with pytest.raises(InputError, match=r"README\.md: not copied: no permission to read it"):
        center(read_embeddings(str(model)), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
