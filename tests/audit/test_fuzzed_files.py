"""Damaged files of every kind: each is read, or refused in one line; no other exception, little memory, no hang."""

import json
import random
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from gensim.models import KeyedVectors
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from spacy.vocab import Vocab
from tokenizers import Tokenizer, models, pre_tokenizers

from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.errors import InputError

MUTATIONS = 300
MATRIX = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
STATE = {"model.embed_tokens.weight": MATRIX, "lm_head.weight": MATRIX + 1, "norm.weight": MATRIX[0].clone()}


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"Ġw{i}" for i in range(40)])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, MATRIX.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gensim(path: Path) -> None:
    vectors = KeyedVectors(12)
    vectors.add_vectors([f"w{i}" for i in range(40)], MATRIX.numpy())
    vectors.save(str(path))


def write_onnx(path: Path) -> None:
    ids, out = (
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in (("input_ids", TensorProto.INT64), ("out", TensorProto.FLOAT))
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["x"]),
        helper.make_node("Gather", ["e", "input_ids"], ["h"]),
        helper.make_node("MatMul", ["h", "x"], ["out"]),
    ]
    constants = {"e": MATRIX.numpy(), "q": np.ones((12, 40), np.int8), "s": np.float32(0.5)}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [ids], [out], tensors)), path)


def write_vocabulary(path: Path) -> None:
    made = Vocab()
    for number, row in enumerate(MATRIX.numpy()):
        made.set_vector(f"w{number}", row)
    made.vectors.resize(MATRIX.shape)
    made.to_disk(path.parent)


def write_model(directory: Path, described: str, text: str) -> None:
    directory.mkdir()
    save_file(STATE, directory / "model-1.safetensors")
    (directory / described).write_text(text)


def write_tokenizer(path: Path) -> None:
    write_model(path.parent, "config.json", '{"architectures": ["LlamaForCausalLM"]}')
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "lake": 1, "moon": 2, "##s": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(path))


CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "vocab_size": 40})
INDEX = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(STATE, "model-1.safetensors")})

#: The file that is damaged, below a directory of the test, and what writes it.
FILES: dict[str, Callable[[Path], object]] = {
    "m.npy": lambda path: np.save(path, MATRIX.numpy()),
    "m.npz": lambda path: np.savez(path, embeddings=MATRIX.numpy(), other=np.arange(5)),
    "deflated.npz": lambda path: np.savez_compressed(path, embeddings=MATRIX.numpy(), other=np.arange(5)),
    "m.safetensors": lambda path: save_file(STATE, path),
    "m.bin": lambda path: torch.save(STATE, path),
    "legacy.pt": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "m.gguf": write_gguf,
    "m.kv": write_gensim,
    "m.onnx": write_onnx,
    "v/key2row": write_vocabulary,
    "a/config.json": lambda path: write_model(path.parent, path.name, CONFIG),
    "b/model.safetensors.index.json": lambda path: write_model(path.parent, path.name, INDEX),
    "c/tokenizer.json": write_tokenizer,
}


def mutations(whole: bytes, text: bool) -> Iterator[bytes]:
    """Flipped bits, changed, inserted and zeroed bytes, and truncations; twice as often in the first kilobyte."""
    rng = random.Random(0)
    for number in range(MUTATIONS):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(min(len(whole), 1024) if rng.random() < 0.5 else len(whole))
            value = rng.choice(b'[]{}",:0-e') if text else rng.randrange(256)
            match number % 5:
                case 0:
                    damaged[place] ^= 1 << rng.randrange(8)
                case 1:
                    damaged[place] = value
                case 2:
                    damaged[place:place] = bytes([value]) * rng.choice((1, 4, 1000))
                case 3:
                    damaged[place : place + rng.choice((1, 8, 200))] = b""
                case _:
                    damaged = damaged[:place] or damaged[:1]
                    break
        yield bytes(damaged)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    model = path if path.parent == tmp_path else path.parent
    assert torch.equal(read_embeddings(str(model)).input, MATRIX)
    whole, before, refused = path.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for damaged in mutations(whole, name.endswith(".json")):
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = read_embeddings(str(model))
                if read.words:
                    read.words.token_of("lake")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) <= 1000
    assert refused > 0
    assert refused < MUTATIONS or name.endswith(".npz"), "an archive has a checksum of nearly every byte"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
