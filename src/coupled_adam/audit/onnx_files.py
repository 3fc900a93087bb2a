"""ONNX models: which constants of the graph are the embeddings, by what is looked up with the token IDs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.audit.embedding_names import find_input, find_output
from coupled_adam.audit.tensor_files import PackedError, Shape, Tensors, readable
from coupled_adam.errors import InputError, require

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

#: The input that holds the token IDs, as exporters name it; and parts of the names of other integers.
TOKENS, OTHERS = "input_ids", ("mask", "position", "type", "segment")

#: Operations that token IDs, or the scores of tokens, pass through without becoming something else.
ALONG = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Flatten", "Where", "Clip")
BACK = (*ALONG, "Add", "Mul", "Div")

#: Operations whose table is packed or quantized together with what it is multiplied with.
PACKED = ("GatherBlockQuantized",)
PACKED_PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "QLinearMatMul")


@dataclass(frozen=True)
class Table:
    """A constant matrix of the graph: a stored tensor, perhaps transposed, or dequantized by s·(q − z)."""

    name: str
    transposed: bool = False
    scale: str | None = None
    zero: str | None = None
    axis: int = 1


class Model:
    """The graph of one file.

    Args:
        path: of the file.

    Raises:
        InputError: it is damaged or of another format.
        ImportError: the package onnx is not installed.
    """

    def __init__(self, path: Path) -> None:
        require("onnx", "onnx")
        import onnx

        with readable(path, "file of ONNX"):
            graph = onnx.load(str(path), load_external_data=False).graph
            self.path = path
            self.constants: dict[str, TensorProto] = {}
            self.nodes: list[NodeProto] = []
            self._collect(graph)
            integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
            self.inputs = [i.name for i in graph.input if i.type.tensor_type.elem_type in integers]
            self.outputs = [output.name for output in graph.output]
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.tensors = Tensors(dict.fromkeys(self.constants, path), self._shape, self._stored)

    def _collect(self, graph: "GraphProto") -> None:
        """List constants and nodes, also of graphs within: decoders have one for the first token, one for others."""
        self.constants |= {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            self.nodes.append(node)
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self.constants[node.output[0]] = attribute.t
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self._collect(inner)

    def _shape(self, name: str) -> Shape:
        return tuple(self.constants[name].dims)

    def _stored(self, name: str) -> Tensor:
        from onnx import TensorProto, helper, numpy_helper

        tensor = self.constants[name]
        with readable(self.path, "file of ONNX"):
            if tensor.data_location == TensorProto.EXTERNAL:
                array = self._external(tensor, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)))
            else:
                array = numpy_helper.to_array(tensor)
            if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
                raise PackedError(f"{self.path}: {name!r} holds {array.dtype}: packed embeddings are not supported")
            return torch.from_numpy(
                np.array(array, dtype=np.float32 if array.dtype.name == "bfloat16" else array.dtype)
            )

    def _external(self, tensor: "TensorProto", dtype: np.dtype[Any]) -> NDArray[Any]:
        """Map what lies in another file; onnx itself refuses links, of which the cache of the hub consists."""
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = Path(said["location"])
        if location.is_absolute() or ".." in location.parts:
            raise InputError(f"{self.path}: {tensor.name!r} lies in {str(location)!r}, outside the model")
        file = self.path.parent / location
        if not file.is_file():
            raise InputError(f"{self.path}: its weights are in {location}, which is missing; put it beside this file")
        return np.memmap(file, dtype, "r", int(said.get("offset", 0)), tuple(tensor.dims))

    def matrix(self, table: Table) -> Tensor:
        """Read a table as (V, H), float64 as it is, else float32.

        Raises:
            InputError: as ``Tensors.matrix``.
        """
        scale = table.scale
        found = self.tensors.matrix(table.name) if scale is None else self._dequantized(table, scale)
        return found.T.contiguous() if table.transposed else found

    def _dequantized(self, table: Table, scale: str) -> Tensor:
        stored = self.tensors.stored(table.name).to(torch.float32)
        sizes = (1, stored.shape[table.axis])

        def along(name: str) -> Tensor:
            """Read one number for all, or one for each row or column."""
            values = self.tensors.stored(name).to(torch.float32)
            if values.numel() not in sizes or values.ndim > 1:
                raise PackedError(f"{self.path}: {table.name!r} is quantized in blocks, which is not supported")
            return values.reshape((-1, 1) if table.axis == 0 else (1, -1))

        return (stored if table.zero is None else stored - along(table.zero)) * along(scale)

    def shape(self, table: Table) -> Shape:
        shape = self._shape(table.name)
        return shape[::-1] if table.transposed else shape

    def table(self, name: str) -> Table | None:
        """Return the constant that a value of the graph is; None if it is none."""
        if name in self.constants:
            return Table(name) if len(self.constants[name].dims) == 2 else None
        node = self.producer.get(name)
        if node is None or node.op_type not in ("Identity", "Cast", "Transpose", "DequantizeLinear"):
            return None
        inner = self.table(node.input[0])
        if inner is None:
            return None
        if node.op_type == "Transpose":
            return replace(inner, transposed=not inner.transposed)
        return self._scaled(inner, node) if node.op_type == "DequantizeLinear" else inner

    def _scaled(self, table: Table, node: "NodeProto") -> Table | None:
        """Return a table with the scales of a node that dequantizes it, or what was looked up in it."""
        scale, zero = node.input[1], node.input[2] if len(node.input) > 2 and node.input[2] else None
        if table.transposed or scale not in self.constants or (zero is not None and zero not in self.constants):
            return None
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        return replace(table, scale=scale, zero=zero, axis=int(axis) % 2)

    def find_input(self) -> Table | None:
        """Find the table that is looked up with the token IDs: of several, the one with most rows."""
        for name in sorted(self.inputs, key=lambda name: name != TOKENS):
            if any(part in name.lower() for part in OTHERS):
                continue
            if tables := list(self._looked_up(name)):
                return max(tables, key=lambda table: self.shape(table)[0])
        named = find_input(self.tensors)
        return Table(named) if named else None

    def _looked_up(self, name: str) -> Iterator[Table]:
        waiting, seen = [name], {name}
        while waiting:
            value = waiting.pop()
            for node in self.consumers.get(value, []):
                if node.op_type in PACKED and len(node.input) > 1 and node.input[1] == value:
                    raise PackedError(
                        f"{self.path}: the token embedding {node.input[0]!r} is packed ({node.op_type}), which is not "
                        "supported; use the model before quantization"
                    )
                if node.op_type == "Gather" and node.input[1] == value:
                    yield from self._table_of(node)
                elif node.op_type == "EmbedLayerNormalization" and node.input[0] == value:
                    table = self.table(node.input[2])
                    yield from [] if table is None else [table]
                elif node.op_type in ALONG:
                    new = set(node.output) - seen
                    seen |= new
                    waiting += new

    def _table_of(self, gather: "NodeProto") -> Iterator[Table]:
        table = self.table(gather.input[0])
        if table is None or _attribute(gather, "axis", 0) != 0:
            return
        after = [n for n in self.consumers.get(gather.output[0], []) if n.op_type == "DequantizeLinear"]
        if after and table.scale is None and not table.transposed:  # rows are looked up first, then dequantized
            table = self._scaled(table, after[0]) or table
        yield table

    def find_output(self, rows: int, width: int) -> Table | None:
        """Find the table that a hidden state is multiplied with for the scores of tokens; None if there is none.

        Args:
            rows, width: the shape of the token embedding. What differs in width, or has less than half its rows, is
                another layer.

        Raises:
            PackedError: there is one, in a form that is not read.
        """
        for node in self._last_products():
            if node.op_type in PACKED_PRODUCTS:
                shapes = [self._shape(name) for name in node.input if name in self.constants]
                if any(2 * max(shape, default=0) >= rows for shape in shapes):
                    raise PackedError(f"it is packed or quantized ({node.op_type})")
                continue
            table = self.table(node.input[1])
            if table is not None and not (node.op_type == "Gemm" and _attribute(node, "transB", 0)):
                table = replace(table, transposed=not table.transposed)
            if table is not None and self.shape(table)[1] == width and 2 * self.shape(table)[0] >= rows:
                return table
        named = find_output(self.tensors, rows, width)
        return Table(named) if named else None

    def _last_products(self) -> Iterator["NodeProto"]:
        """Find the products of matrices that the outputs are, but for biases, scales and shapes."""
        waiting, seen = list(self.outputs), set[str]()
        for name in waiting:
            node = self.producer.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            if node.op_type in ("MatMul", "Gemm", *PACKED_PRODUCTS):
                yield node
            elif node.op_type in BACK:
                waiting += node.input


def _attribute(node: "NodeProto", name: str, default: int) -> int:
    found: list[AttributeProto] = [a for a in node.attribute if a.name == name]
    return int(found[0].i) if found else default
