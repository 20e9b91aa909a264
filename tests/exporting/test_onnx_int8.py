"""Int8 ONNX graphs: an outlier in one token, column or row leaves the others exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.checker
from onnx.parser import parse_model

from dsbs.exporting.onnx_int8 import quantize_onnx
from dsbs.students.backends.onnxruntime import load_session

GRAPH = """
<ir_version: 10, opset_import: ["": 20]>
g (int64[B, S] ids) => (float[B, S, 32] hidden, float[B, S, 16] output) {
    hidden = Gather(table, ids)
    output = MatMul(hidden, matrix)
}
"""


def test_an_outlier_does_not_make_other_tokens_coarse(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = random.normal(size=(80, 32)).astype(np.float32)
    table[0] = 0
    table[3] *= 1000
    matrix = random.normal(size=(32, 16)).astype(np.float32)
    matrix[:, 0] *= 1000
    matrix[:, 1] = 0
    model = parse_model(GRAPH)
    for name, values in (("table", table), ("matrix", matrix)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    quantize_onnx(file)
    small = onnx.load(file)
    onnx.checker.check_model(small)
    assert not {"table", "matrix"} & {tensor.name for tensor in small.graph.initializer}
    ids = np.arange(80).reshape(8, 10)
    hidden, output = load_session(file).run(None, {"ids": ids})
    sizes = np.abs(table).max(1)[ids][..., None] + 1e-9
    assert np.abs((hidden - table[ids]) / sizes).max() < 0.005
    scale = sizes * (np.abs(matrix).max(0) + 1e-9)
    assert np.abs((output - table[ids] @ matrix) / scale).max() < 0.1
