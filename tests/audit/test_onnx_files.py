"""ONNX models, exported by torch or put together with the package onnx, whose interpreter says what they compute."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from in_process import command
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, BertModel

from coupled_adam.audit.embedding_files import read_embeddings
from coupled_adam.errors import InputError

V, H = 40, 8
E = np.random.default_rng(0).normal(size=(V, H)).astype(np.float32) + 1
HEAD = np.random.default_rng(1).normal(size=(V, H)).astype(np.float32)
Q = np.random.default_rng(2).integers(-128, 128, size=(V, H)).astype(np.int8)
IDS = np.arange(V)[None]


class Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        return made


class Untied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.places = torch.nn.Embedding(V, H), torch.nn.Embedding(3 * V, H)
        self.last = torch.nn.Linear(H, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])[None]
        scores: torch.Tensor = self.last(torch.tanh(self.first(ids) + self.places(places)))
        return scores / 3


def exported(model: torch.nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (torch.zeros(1, 5, dtype=torch.int64),),
            path,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_axes={"input_ids": [0, 1]},
            dynamo=False,
        )
    return path


def bert(kind: Any) -> Any:
    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 16, "num_hidden_layers": 1}
    return kind(BertConfig(**sizes, num_attention_heads=2, attn_implementation="eager"))


def test_an_exported_encoder_has_its_embedding_and_the_words_of_its_folder(tmp_path: Path) -> None:
    model = bert(BertModel)
    path = exported(Wrapped(model), tmp_path / "onnx" / "model.onnx")
    model.config.save_pretrained(tmp_path)
    Tokenizer(models.WordLevel({"lake": 0, "dog": 1}, "lake")).save(str(tmp_path / "tokenizer.json"))
    found = read_embeddings(str(path))
    assert torch.equal(found.input, model.get_input_embeddings().weight) and found.origin.kind == "onnx"
    assert found.output is None and found.notes == () and found.words is not None
    assert found.words.token_of("dog") == 1
    with pytest.raises(InputError, match=r"name what to read of it: onnx/model\.onnx"):
        read_embeddings(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_language_model_has_both_matrices(tied: bool, tmp_path: Path) -> None:
    model = bert(BertForMaskedLM) if tied else Untied()
    found = read_embeddings(str(exported(Wrapped(model) if tied else model, tmp_path / "any")))
    first = model.get_input_embeddings() if tied else model.first
    assert torch.equal(found.input, first.weight) and found.tied is tied and not found.lacks_output
    if not tied:
        assert found.output is not None and torch.equal(found.output, model.last.weight)
    else:
        assert found.output is None


def put_together(
    path: Path, nodes: list[Any], constants: dict[str, Any], names: str = "input_ids", **kinds: int
) -> Path:
    """A graph from token IDs to ``out``."""
    tensors = [
        helper.make_tensor(name, kinds[name], value.shape, value.tobytes(), raw=True)
        if name in kinds
        else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(names, TensorProto.INT64, [1, None])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def node(kind: str, *inputs: str, out: str = "out", **options: Any) -> Any:
    return helper.make_node(kind, list(inputs), [out], **options)


SCALE, ROWS, ZERO = np.float32(0.05), np.linspace(0.1, 2, V, dtype=np.float32), np.int8(3)
GRAPHS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "plain": ([node("Gather", "x", "input_ids")], {"x": E}),
    "half": ([node("Gather", "x", "input_ids", out="h"), node("Cast", "h", to=1)], {"x": E.astype(np.float16)}),
    "through": (
        [
            node("Cast", "input_ids", out="a", to=6),
            node("Transpose", "x", out="t", perm=[1, 0]),
            node("Gather", "t", "a"),
        ],
        {"x": E.T.copy()},
    ),
    "constant": (
        [node("Constant", out="x", value=numpy_helper.from_array(E)), node("Gather", "x", "input_ids")],
        {},
    ),
    "dequantized, then looked up": (
        [node("DequantizeLinear", "q", "s", "z", out="x"), node("Gather", "x", "input_ids")],
        {"q": Q, "s": np.array(SCALE), "z": np.array(ZERO)},
    ),
    "scales of rows": (
        [node("DequantizeLinear", "q", "s", out="x", axis=0), node("Gather", "x", "input_ids")],
        {"q": Q, "s": ROWS},
    ),
    "scales of columns": (
        [node("DequantizeLinear", "q", "s", out="x"), node("Gather", "x", "input_ids")],
        {"q": Q, "s": ROWS[:H].copy()},
    ),
    "looked up, then dequantized": (
        [node("Gather", "q", "input_ids", out="x"), node("DequantizeLinear", "x", "s", "z")],
        {"q": Q.view(np.uint8), "s": np.array(SCALE), "z": np.array(ZERO).astype(np.uint8)},
    ),
}


@pytest.mark.parametrize("form", GRAPHS)
def test_rows_are_what_the_graph_gives_for_each_token(form: str, tmp_path: Path) -> None:
    path = put_together(tmp_path / "m.onnx", *GRAPHS[form])
    (theirs,) = ReferenceEvaluator(str(path)).run(None, {"input_ids": IDS})
    found = read_embeddings(str(path))
    np.testing.assert_allclose(found.input, theirs[0], rtol=1e-6)
    assert any("is quantized, and was measured as" in note for note in found.notes) == ("q" in GRAPHS[form][1])


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Gemm, transposed", "quantized"])
def test_the_matrix_of_the_scores_is_the_output_embedding(form: str, tmp_path: Path) -> None:
    look, flat = node("Gather", "x", "input_ids", out="h"), node("Reshape", "h", "shape", out="f")
    constants: dict[str, Any] = {"x": E, "w": HEAD, "shape": np.array([-1, H]), "b": HEAD[:, 0].copy()}
    ends = {
        "MatMul": [node("MatMul", "h", "v", out="y"), node("Add", "b", "y")],
        "Gemm": [flat, node("Gemm", "f", "v", "b")],
        "Gemm, transposed": [flat, node("Gemm", "f", "w", transB=1)],
        "quantized": [
            node("DequantizeLinear", "v", "s", out="k"),
            node("MatMul", "h", "k", out="y"),
            node("Mul", "y", "s"),
        ],
    }
    constants["v"] = HEAD.T.copy()
    if form == "quantized":
        constants |= {"v": Q.T.copy(), "s": np.array(SCALE)}
    path = put_together(tmp_path / "m.onnx", [look, *ends[form]], constants)
    found = read_embeddings(str(path))
    assert found.output is not None and found.tied is False and np.array_equal(found.input, E)
    np.testing.assert_allclose(found.output, Q * SCALE if form == "quantized" else HEAD, rtol=1e-6)


def test_a_packed_head_is_told_and_a_packed_embedding_refused(tmp_path: Path) -> None:
    product = node("MatMulNBits", "h", "w", "s", K=H, N=V, bits=4, block_size=16, domain="com.microsoft")
    constants = {"x": E, "w": np.zeros((V, 1, 8), np.uint8), "s": np.ones(V, np.float32)}
    found = read_embeddings(
        str(put_together(tmp_path / "m.onnx", [node("Gather", "x", "input_ids", out="h"), product], constants))
    )
    assert found.lacks_output and "it is packed or quantized (MatMulNBits)" in found.notes[0]
    look = node("GatherBlockQuantized", "w", "input_ids", "s", domain="com.microsoft")
    with pytest.raises(InputError, match=r"'w' is packed \(GatherBlockQuantized\)"):
        read_embeddings(str(put_together(tmp_path / "p.onnx", [look], constants)))
    blocks = [node("DequantizeLinear", "q", "s", out="x", axis=1, block_size=4), node("Gather", "x", "input_ids")]
    path = put_together(tmp_path / "b.onnx", blocks, {"q": Q, "s": np.ones((V, 2), np.float32)})
    with pytest.raises(InputError, match="quantized in blocks"):
        read_embeddings(str(path))


def test_graphs_within_are_read(tmp_path: Path) -> None:
    """Decoders of one file have a branch for the first token, and one for those that follow."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph(
            [node("Gather", "inner", "input_ids", out="y")], "b", [], [value], [numpy_helper.from_array(E, "inner")]
        )
        for _ in range(2)
    ]
    choice = node("If", "first", then_branch=branches[0], else_branch=branches[1])
    path = put_together(tmp_path / "m.onnx", [choice], {"first": np.array(True)})
    assert np.array_equal(read_embeddings(str(path)).input, E)


def test_bfloat16_and_weights_in_another_file(tmp_path: Path) -> None:
    narrow = torch.from_numpy(E).bfloat16()
    path = put_together(
        tmp_path / "b.onnx",
        [node("Gather", "x", "input_ids")],
        {"x": narrow.view(torch.int16).numpy()},
        x=TensorProto.BFLOAT16,
    )
    assert torch.equal(read_embeddings(str(path)).input, narrow.float())
    for name in ("b.onnx", "m.onnx"):
        if name == "m.onnx":
            path = put_together(tmp_path / name, *GRAPHS["plain"])
        wanted = read_embeddings(str(path)).input
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{name}.data", size_threshold=0)
        assert torch.equal(read_embeddings(str(path)).input, wanted)
    (tmp_path / "blob").write_bytes((tmp_path / "m.onnx.data").read_bytes())
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(InputError, match=r"its weights are in m\.onnx\.data, which is missing"):
        read_embeddings(str(path))
    (tmp_path / "m.onnx.data").symlink_to(tmp_path / "blob")  # as in the cache of the hub
    assert np.array_equal(read_embeddings(str(path)).input, E)
    (tmp_path / "m.onnx.data").unlink()
    (tmp_path / "m.onnx.data").write_bytes(b"short")
    with pytest.raises(InputError, match="truncated"):
        read_embeddings(str(path))
    model = onnx.load(path, load_external_data=False)
    for location in ("../m.onnx.data", "/etc/hostname"):
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
        path.write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match="outside the model"):
            read_embeddings(str(path))


def test_another_tensor_is_read_by_its_name_and_nothing_is_written(tmp_path: Path) -> None:
    path = put_together(tmp_path / "m.onnx", [node("Gather", "x", "input_ids")], {"x": E, "other": HEAD})
    assert np.array_equal(read_embeddings(str(path), tensor="other").input, HEAD)
    done = command("audit", path, "--center", tmp_path / "copy.onnx")
    assert done.returncode == 2 and "an ONNX file cannot be written" in done.stderr


def test_a_graph_that_looks_nothing_up_lists_its_matrices(tmp_path: Path) -> None:
    look = [node("Cast", "input_ids", out="h", to=1), node("MatMul", "h", "x")]
    path = put_together(tmp_path / "m.onnx", look, {"x": E, "other": HEAD[:9]})
    with pytest.raises(InputError, match=r"name one \(--tensor\): .* x 40 × 8, other 9 × 8"):
        read_embeddings(str(path))


def test_damaged_models_and_a_missing_package_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_together(tmp_path / "m.onnx", *GRAPHS["plain"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(InputError, match="truncated, or not a file of ONNX"):
        read_embeddings(str(path))
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert read_embeddings(str(path)).tied is False
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    done = command("audit", path)
    assert done.returncode == 2 and "onnx not installed" in done.stderr and ".[onnx]" in done.stderr
