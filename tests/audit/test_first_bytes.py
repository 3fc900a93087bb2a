"""What stands in the place of a model, and formats that are not read, are named for what they are."""

import argparse
import collections
import gzip
import json
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.errors import InputError

E = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548105171\n"
PAGE = "\n<!DOCTYPE html>\n<html><head></head></html>"


@pytest.mark.parametrize(
    ("content", "named"), [(POINTER, "a Git LFS pointer.*: run git lfs pull"), (PAGE, "a web page")]
)
@pytest.mark.parametrize(
    "name",
    ["m.safetensors", "m.gguf", "m.npy", "m.npz", "m.pt", "m.bin", "m.ckpt", "any"]
    + [f"d/{name}" for name in ("model.safetensors", "pytorch_model.bin", "x.safetensors", "adapter_model.bin")]
    + [f"d/{name}" for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json", "modules.json")]
    + [f"whole/{name}" for name in ("config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")]
    + ["whole/adapter_config.json", "whole/tokenizer_config.json"],
)
def test_what_stands_in_the_place_of_a_file_is_named(name: str, content: str, named: str, tmp_path: Path) -> None:
    for directory in ("d", "whole"):
        (tmp_path / directory).mkdir()
    save_file({"wte.weight": E}, tmp_path / "whole" / "model.safetensors")
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=rf"{path.name}: {named}"):
        read_embeddings(str(path.parent if path.parent != tmp_path else path))


def zipped(path: Path, **files: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("name", "write", "named"),
    [
        ("cc.bin", lambda path: path.write_bytes(struct.pack("<ii", 793712314, 12) + bytes(99)), "format of fastText"),
        ("m.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
        ("m.bin", lambda path: path.write_bytes(gzip.compress(bytes(99))), "compressed with gzip"),
        ("m.zip", lambda path: zipped(path, readme="x"), "zip archive without arrays or tensors"),
        ("m.safetensors", lambda path: path.write_text("Entry not found"), "begins with 'Entry not found'"),
        ("m.unknown", lambda path: path.write_bytes(os.urandom(8) + b"\0" * 9), "not a supported type of file"),
        ("m.npz", lambda path: np.savez(path), "truncated|contains no arrays|without arrays"),
    ],
)
def test_formats_that_are_not_read_are_named_and_nobody_is_accused(
    name: str, write: Callable[[Path], object], named: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match=named) as error:
        read_embeddings(str(tmp_path / name))
    assert "run code" not in str(error.value) and "\n" not in str(error.value)


def saved_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, E.numpy())


def archive_of_arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, embeddings=E.numpy())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.md", "what these are")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vectors", saved_array),
        ("arrays", archive_of_arrays),
        ("arrays.npz", archive_of_arrays),
        ("last.ckpt", lambda path: torch.save({"state_dict": {"wte.weight": E}, "epoch": 3}, path)),
        ("weights.pkl", lambda path: torch.save({"wte.weight": E}, path)),
        ("weights", lambda path: torch.save({"wte.weight": E}, path)),
        ("weights.bin", lambda path: save_file({"wte.weight": E}, path)),
        ("M.SAFETENSORS", lambda path: save_file({"wte.weight": E}, path)),
        ("m.pt", lambda path: torch.save({"model": {"wte.weight": E}, "best": np.float64(2.5)}, path)),
        ("m.pt", lambda path: torch.save({"wte.weight": E, "rng": np.random.default_rng(0).normal(size=9)}, path)),
        (
            "m.pt",
            lambda path: torch.save(
                {"wte.weight": E, "loss": np.float32(1)}, path, _use_new_zipfile_serialization=False
            ),
        ),
    ],
)
def test_files_are_known_by_their_content(name: str, write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert torch.equal(read_embeddings(str(tmp_path / name)).input, E)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(layers=3), "argparse.Namespace"),
        (pathlib.PurePosixPath("x"), r"pathlib\.(_local\.)?PurePosixPath"),
        (torch.nn.Embedding(3, 2), "torch.nn.modules.sparse.Embedding"),
        (collections.deque([1]), "collections.deque"),
        (slice(1, 2), "builtins.slice"),
        (np.random.default_rng(0), r"numpy\.random\._pickle\.\w+"),
    ],
)
@pytest.mark.parametrize("archive", [True, False])
def test_a_class_beside_the_tensors_is_named(value: Any, named: str, archive: bool, tmp_path: Path) -> None:
    torch.save({"wte.weight": E, "args": value}, tmp_path / "m.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(InputError, match=rf"could run arbitrary code when loaded \({named}\)"):
        read_embeddings(str(tmp_path / "m.pt"))


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_told_from_dangerous_ones(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"wte": [1.0, 2.0], "n": 3}, protocol))
    with pytest.raises(InputError, match=r"a pickle that torch\.save did not write"):
        read_embeddings(str(path))
    path.write_bytes(pickle.dumps({"wte": collections.deque()}, protocol))
    with pytest.raises(InputError, match=r"run arbitrary code when loaded \(collections\.deque\)"):
        read_embeddings(str(path))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1, 1).expand(3 * 10**9, 1), "declares 12,000,000,000 bytes but stores 4"),
        (torch.zeros(8).as_strided((4, 8), (0, 1)), "declares 128 bytes but stores 32"),
        (E.to_sparse(), "a sparse tensor"),
        (torch.empty(20, 4, device="meta"), "a meta tensor"),
        (torch.ones(20, 4).to(torch.int8), "holds int8"),
        (torch.ones(20, 4, dtype=torch.complex64), "holds complex64"),
        (torch.empty(5, 0), "shape"),
    ],
)
def test_tensors_that_hold_no_matrix_take_no_memory(tensor: torch.Tensor, reason: str, tmp_path: Path) -> None:
    torch.save({"wte.weight": tensor}, tmp_path / "m.pt")
    (tmp_path / "other").mkdir()
    torch.save({"wte.weight": E, "mask": tensor}, tmp_path / "other" / "m.pt")
    with pytest.raises(InputError, match=rf"m\.pt: .*{reason}") if "shape" not in reason else pytest.raises(ValueError):
        from coupled_adam.audit.models import audit_models

        audit_models([str(tmp_path / "m.pt")], ())
    assert torch.equal(read_embeddings(str(tmp_path / "other" / "m.pt")).input, E), "another tensor matters to nobody"


def test_a_program_and_a_compressed_archive_are_named(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Embedding(20, 4)).save(str(tmp_path / "m.pt"))
    with pytest.raises(InputError, match="a TorchScript archive"):
        read_embeddings(str(tmp_path / "m.pt"))
    torch.save({"wte.weight": torch.zeros(10**6, 4)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "m.bin", "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for name in plain.namelist():
            made.writestr(name, plain.read(name))
    with pytest.raises(InputError, match="a compressed archive"):
        read_embeddings(str(tmp_path / "m.bin"))


def test_an_encrypted_archive_and_odd_shapes_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", embeddings=E.numpy())
    whole = bytearray((tmp_path / "m.npz").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(signature) + offset] |= 1  # the flag of encryption
    (tmp_path / "m.npz").write_bytes(whole)
    with pytest.raises(InputError, match="encrypted"):
        read_embeddings(str(tmp_path / "m.npz"))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 5), }".ljust(117) + b"\n"
    (tmp_path / "m.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(20))
    with pytest.raises(InputError, match="declares the shape"):
        read_embeddings(str(tmp_path / "m.npy"))


DEEP = 10**5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "modules.json"])
@pytest.mark.parametrize("content", ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, "5", "null", "[]", '"x"', ""])
def test_json_of_the_wrong_shape_is_one_line(name: str, content: str, tmp_path: Path) -> None:
    place = "other" if name.startswith("mod") else "model"
    save_file({"wte.weight": E}, tmp_path / f"{place}.safetensors")
    (tmp_path / name).write_text(content)
    try:
        read = read_embeddings(str(tmp_path))
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert (name, content) == ("modules.json", "[]") and torch.equal(read.input, E)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": 5},
        {"architectures": [5]},
        {"architectures": {"a": 1}},
        {"tie_word_embeddings": "no"},
        {"text_config": {"tie_word_embeddings": 1}},
    ],
)
def test_values_of_the_wrong_kind_in_a_configuration_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    save_file({"wte.weight": E}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: damaged \((architectures|tie_word_embeddings): "):
        read_embeddings(str(tmp_path))


def test_a_deeply_nested_pickle_is_one_line(tmp_path: Path) -> None:
    nested = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * DEEP + b"}" + b"s" * DEEP + b"."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", nested)
        archive.writestr("m/version", "3\n")
    for content in ((tmp_path / "m.pt").read_bytes(), nested):
        (tmp_path / "m.pt").write_bytes(content)
        with pytest.raises(InputError) as error:
            read_embeddings(str(tmp_path / "m.pt"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["m.npy", "d/model.safetensors", "d/config.json", "d/tokenizer.json", "d/vocab.txt"])
def test_pipes_and_devices_are_not_read(place: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    save_file({"wte.weight": E}, tmp_path / "d" / "model.safetensors")
    path = tmp_path / place
    path.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        with pytest.raises(InputError, match=f"{path.name}: a pipe or device, not a file"):
            read_embeddings(str(path if path.parent == tmp_path else path.parent))
        path.unlink()


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.UINT8, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY])
def test_a_gguf_file_that_claims_more_than_it_holds_takes_no_memory(kind: gguf.GGUFValueType, tmp_path: Path) -> None:
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, 2**40)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + bytes(100))
    with pytest.raises(InputError, match=r"m\.gguf: truncated, or not a GGUF file"):
        read_embeddings(str(tmp_path / "m.gguf"))
