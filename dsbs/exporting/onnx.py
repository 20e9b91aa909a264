"""ONNX format: an encoder that computes cross-attention keys and values, and a decoder step.

Two graphs, by PyTorch's exporter: a step costs one token however long the text is, and no graph has
a branch for the first step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError, needs_extra
from dsbs.exporting.formats import FLOAT32, label_view
from dsbs.students import Student
from dsbs.students.backends.onnxruntime import DECODER, ENCODER, onnxruntime

_SCRIPT = '''"""Print the student's output for each line of stdin."""
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers

here = Path(__file__).resolve().parent
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
encoder = onnxruntime.InferenceSession(str(here / "encoder.onnx"))
decoder = onnxruntime.InferenceSession(str(here / "decoder.onnx"))
state_names = [tensor.name for tensor in encoder.get_outputs()]
cache_shapes = {{
    tensor.name: tensor.shape for tensor in decoder.get_inputs() if tensor.name.startswith("past")
}}
for line in sys.stdin:
    ids = np.array([tokenizer.encode({prefix} + line.strip()).ids])
    mask = np.ones_like(ids)
    feed = dict(zip(state_names, encoder.run(None, {{"ids": ids, "mask": mask}})))
    feed["mask"] = mask
    for name, (_, heads, _, size) in cache_shapes.items():
        feed[name] = np.zeros((1, heads, 0, size), np.float32)
    output = [{start_id}]
    while len(output) <= {max_tokens} and output[1:][-1:] != [{end_id}]:
        scores, *cache = decoder.run(None, feed | {{"token": np.array([output[-1:]])}})
        feed |= dict(zip(cache_shapes, cache))
        output.append(int(scores[0].argmax()))
    print(tokenizer.decode(output[1:]).strip(), flush=True)
'''


class OnnxFormat:
    """T5 in v1.0 and v1.1 shapes."""

    kinds = ("seq2seq",)
    quantizations = (FLOAT32, "int8")
    packages = ("onnxruntime", "tokenizers", "numpy")

    def check(self, student: Student, quantize: str) -> str | None:
        onnxruntime()
        with needs_extra("onnx", "the format onnx"):
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        model_type = student.backend.model.config.model_type
        if model_type not in ("t5", "mt5"):
            raise UserError(
                f"the format onnx supports T5 only, not {model_type}", hint="try --format torch"
            )
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        model = deepcopy(student.backend.model).to("cpu").eval()
        model.set_attn_implementation("eager")
        model.config.save_pretrained(folder)
        try:
            with _quiet_exporter():
                # The quantiser transposes the head's matrix in place, so it needs a copy.
                _write_graphs(model, folder, untied=quantize != FLOAT32)
                if quantize == "int8":
                    _quantize(folder)
        except (RuntimeError, AttributeError) as error:  # of PyTorch's exporter
            message = " ".join(str(error).split())[:240]
            raise DsbsError(
                f"PyTorch cannot export {student.card.name} to ONNX ({message})",
                hint="try --format ct2 or torch",
            ) from None

    def script(self, student: Student, quantize: str) -> str:
        view = label_view(student)
        return _SCRIPT.format(
            prefix=repr(view.prefix),
            start_id=view.start_id,
            max_tokens=view.max_tokens,
            end_id=student.backend.model.config.eos_token_id,
        )


def _quantize(folder: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in (ENCODER, DECODER):
        graph = onnx.load(folder / name)
        del graph.graph.value_info[:]  # shapes that are wrong after quantisation
        quantize_dynamic(graph, folder / name, weight_type=QuantType.QInt8, per_channel=True)


def _write_graphs(model: Any, folder: Path, untied: bool) -> None:
    import torch
    from torch.export import Dim

    from dsbs.exporting.t5_graphs import CrossStates, DecoderStep

    layers = range(len(model.decoder.block))
    state_names = [
        f"{tensor}_{layer}" for layer in layers for tensor in ("cross_key", "cross_value")
    ]
    cache_names = [f"past_{tensor}_{layer}" for layer in layers for tensor in ("key", "value")]
    rows = Dim("rows")
    length = Dim("length")
    past = Dim("before")
    token_ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.ones(2, 5, dtype=torch.long)
    encoder = CrossStates(model)
    with torch.inference_mode():
        states = encoder(token_ids, mask)
    cache = [torch.zeros(2, state.shape[1], 3, state.shape[3]) for state in states]
    text_shape = {0: rows, 1: length}
    torch.onnx.export(
        encoder,
        (token_ids, mask),
        folder / ENCODER,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["ids", "mask"],
        output_names=state_names,
        dynamic_shapes=(text_shape, text_shape),
    )
    torch.onnx.export(
        DecoderStep(model, untied=untied),
        (token_ids[:, :1], mask, list(states), cache),
        folder / DECODER,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["token", "mask", *state_names, *cache_names],
        output_names=["scores", *(f"next_{name}" for name in cache_names)],
        dynamic_shapes=(
            {0: rows},
            text_shape,
            [{0: rows, 2: length}] * len(states),
            [{0: rows, 2: past}] * len(cache),
        ),
    )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide the exporter's progress messages and its own deprecation warnings."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
