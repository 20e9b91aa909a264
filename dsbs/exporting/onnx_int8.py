"""Int8 weights for an ONNX graph, with a scale for every token, matrix column and table row.

Activations are quantized as they come (vector-wise: Dettmers et al., 2022, arXiv:2208.07339). ONNX
Runtime's own quantizer has one scale for a batch's activations and one for an embedding table:
one outlier makes every other value coarse, and a row's label depends on the rows beside it. The
matrices of attention's values stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper


def quantize_onnx(file: Path) -> None:
    """Replace the graph in ``file`` by its int8 version."""
    model = onnx.load(file)
    _Int8Graph(model.graph).quantize()
    onnx.save(model, file)


class _Int8Graph:
    """A graph whose constant matrices and embedding tables become int8, in standard operators."""

    _LARGEST = 127
    _MIN_TABLE_ROWS = 64  # smaller tables hold segments and relative positions

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in self._graph.initializer}
        self._nodes: list[Any] = []
        self._quantized: set[str] = set()  # activations and constants that are int8 already
        self._add_constant("last_axis", np.array([-1], dtype=np.int64))
        self._add_constant("smallest_scale", np.array(1e-12, dtype=np.float32))

    def quantize(self) -> None:
        kept_float = set(self._attention_values())
        for node in list(self._graph.node):
            if node.op_type == "Gather" and self._is_table(node.input[0]):
                self._quantize_lookup(node)
            elif (
                node.op_type == "MatMul"
                and self._is_matrix(node.input[1])
                and node.output[0] not in kept_float
            ):
                self._quantize_product(node)
            else:
                self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        constants = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(constants)
        del self._graph.value_info[:]  # types and shapes before quantization

    def _attention_values(self) -> Iterator[str]:
        """The products that compute attention's values, to whose rounding labels are sensitive."""
        producers = {name: node for node in self._graph.node for name in node.output}
        for node in self._graph.node:
            attends = node.op_type == "MatMul" and node.input[0] in producers
            if not attends or producers[node.input[0]].op_type != "Softmax":
                continue
            source = producers.get(node.input[1])
            while source is not None and source.op_type in ("Transpose", "Reshape", "Add"):
                variable = [name for name in source.input if name not in self._constants]
                source = producers.get(variable[0]) if variable else None
            if source is not None and source.op_type == "MatMul":
                yield source.output[0]

    def _is_matrix(self, name: str) -> bool:
        tensor = self._constants.get(name)
        return (
            tensor is not None
            and tensor.data_type == onnx.TensorProto.FLOAT
            and len(tensor.dims) == 2
        )

    def _is_table(self, name: str) -> bool:
        return self._is_matrix(name) and self._constants[name].dims[0] >= self._MIN_TABLE_ROWS

    def _quantize_lookup(self, node: Any) -> None:
        table, ids = node.input
        output = node.output[0]
        self._quantize_constant(table, axis=1)
        self._add("Gather", [f"{table}_by_row", ids], f"{output}_int8")
        self._add("Cast", [f"{output}_int8"], f"{output}_float", to=onnx.TensorProto.FLOAT)
        self._add("Gather", [f"{table}_row_scale", ids], f"{output}_scale")
        self._add("Mul", [f"{output}_float", f"{output}_scale"], output)

    def _quantize_product(self, node: Any) -> None:
        """Divide each token by its largest value, so that one scale fits all, and multiply after.

        ONNX Runtime fuses the five operators from DynamicQuantizeLinear on.
        """
        tokens, matrix = node.input
        output = node.output[0]
        if tokens not in self._quantized:
            self._quantized.add(tokens)
            self._add("Abs", [tokens], f"{tokens}_token_abs")
            self._add(
                "ReduceMax", [f"{tokens}_token_abs", "last_axis"], f"{tokens}_token_max", keepdims=1
            )
            self._add("Max", [f"{tokens}_token_max", "smallest_scale"], f"{tokens}_token_size")
            self._add("Div", [tokens, f"{tokens}_token_size"], f"{tokens}_token_unit")
            names = [f"{tokens}_token_{suffix}" for suffix in ("int8", "scale", "zero")]
            self._add("DynamicQuantizeLinear", [f"{tokens}_token_unit"], *names)
        self._quantize_constant(matrix, axis=0)
        factors = [f"{tokens}_token_int8", f"{matrix}_by_column", f"{tokens}_token_zero"]
        self._add("MatMulInteger", factors, f"{output}_product_int32")
        self._add(
            "Cast",
            [f"{output}_product_int32"],
            f"{output}_product_float",
            to=onnx.TensorProto.FLOAT,
        )
        scales = [f"{tokens}_token_scale", f"{matrix}_column_scale"]
        self._add("Mul", scales, f"{output}_product_scale")
        self._add(
            "Mul", [f"{output}_product_float", f"{output}_product_scale"], f"{output}_product_unit"
        )
        self._add("Mul", [f"{output}_product_unit", f"{tokens}_token_size"], output)

    def _quantize_constant(self, name: str, axis: int) -> None:
        """Add int8 values and scales. ``axis`` is the one that a scale spans."""
        kind = ("column", "row")[axis]
        if f"{name}_{kind}" in self._quantized:
            return
        self._quantized.add(f"{name}_{kind}")
        values = onnx.numpy_helper.to_array(self._constants[name])
        scales = np.abs(values).max(axis, keepdims=True) / self._LARGEST
        scales[scales == 0] = 1
        self._add_constant(f"{name}_by_{kind}", np.round(values / scales).astype(np.int8))
        shape = (-1,) if axis == 0 else (-1, 1)
        self._add_constant(f"{name}_{kind}_scale", scales.reshape(shape).astype(np.float32))

    def _add(self, operator: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> None:
        self._nodes.append(onnx.helper.make_node(operator, inputs, outputs, **attributes))

    def _add_constant(self, name: str, values: Any) -> None:
        self._graph.initializer.append(onnx.numpy_helper.from_array(values, name))
