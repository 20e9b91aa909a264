"""ONNX by torch's exporter: an encoder that makes the cross-attention's keys and values, and a decoder's step with its past.

Two graphs, so that a step costs one token however long the text is and no graph has a branch for the first step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.exporting.formats import PLAIN, first_task
from dsbs.students import Student
from dsbs.students.backends.onnxruntime import DECODER, ENCODER, onnxruntime

_SCRIPT = '''"""Prints what the student writes to each line of stdin."""
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers

here = Path(__file__).resolve().parent
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
encoder, decoder = (onnxruntime.InferenceSession(str(here / f"{{name}}.onnx")) for name in ("encoder", "decoder"))
kept = [one.name for one in encoder.get_outputs()]
past = {{one.name: one.shape for one in decoder.get_inputs() if one.name.startswith("past")}}
for line in sys.stdin:
    ids = np.array([tokenizer.encode({prefix} + line.strip()).ids])
    feed = {{"mask": np.ones_like(ids)}} | dict(zip(kept, encoder.run(None, {{"ids": ids, "mask": np.ones_like(ids)}})))
    feed |= {{name: np.zeros((1, heads, 0, size), np.float32) for name, (_, heads, _, size) in past.items()}}
    written = [{start}]
    while len(written) <= {most} and written[1:][-1:] != [{end}]:
        scores, *new = decoder.run(None, feed | {{"token": np.array([written[-1:]])}})
        feed |= dict(zip(past, new))
        written.append(int(scores[0].argmax()))
    print(tokenizer.decode(written[1:]).strip(), flush=True)
'''


class OnnxFormat:
    """Of T5 (v1.0 and v1.1 shapes)."""

    kinds = ("seq2seq",)
    quantizations = (PLAIN, "int8")
    packages = ("onnxruntime", "tokenizers", "numpy")

    def check(self, student: Student, quantize: str) -> str | None:
        onnxruntime()
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"the format onnx needs the package {error.name}", hint="pip install 'dsbs[onnx]'"
            ) from None
        kind = student.engine.model.config.model_type
        if kind not in ("t5", "mt5"):
            raise UserError(
                f"the format onnx carries T5 alone here, not {kind}", hint="try --format torch"
            )
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        model = deepcopy(student.engine.model).to("cpu").eval()
        model.set_attn_implementation("eager")
        model.config.save_pretrained(folder)
        try:
            with _silent():
                _write(
                    model, folder, untied=quantize != PLAIN
                )  # the quantiser turns the head's matrix where it stands
                if quantize == "int8":
                    _quantize(folder)
        except (RuntimeError, AttributeError) as error:  # of torch's exporter
            raise DsbsError(
                f"torch cannot export {student.card.name} to ONNX ({' '.join(str(error).split())[:240]})",
                hint="try --format ct2 or torch",
            ) from None

    def script(self, student: Student, quantize: str) -> str:
        first = first_task(student)
        end = student.engine.model.config.eos_token_id
        return _SCRIPT.format(
            prefix=repr(first.prefix), start=first.start, most=first.most, end=end
        )


def _quantize(folder: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in (ENCODER, DECODER):
        graph = onnx.load(folder / name)
        del graph.graph.value_info[:]  # shapes that the quantiser makes untrue
        quantize_dynamic(graph, folder / name, weight_type=QuantType.QInt8, per_channel=True)


def _write(model: Any, folder: Path, untied: bool) -> None:
    import torch
    from torch.export import Dim

    from dsbs.exporting.t5_graphs import CrossStates, Step

    layers = range(len(model.decoder.block))
    cross = [f"{what}_{layer}" for layer in layers for what in ("cross_key", "cross_value")]
    past = [f"past_{what}_{layer}" for layer in layers for what in ("key", "value")]
    rows, length, before = Dim("rows"), Dim("length"), Dim("before")
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.ones(2, 5, dtype=torch.long)
    encoder = CrossStates(model)
    with torch.inference_mode():
        states = encoder(ids, mask)
    kept = [torch.zeros(2, state.shape[1], 3, state.shape[3]) for state in states]
    both = {0: rows, 1: length}
    torch.onnx.export(
        encoder, (ids, mask), folder / ENCODER, dynamo=True, external_data=False, verbose=False,
        input_names=["ids", "mask"], output_names=cross, dynamic_shapes=(both, both),
    )  # fmt: skip
    torch.onnx.export(
        Step(model, untied=untied), (ids[:, :1], mask, list(states), kept), folder / DECODER,
        dynamo=True, external_data=False, verbose=False,
        input_names=["token", "mask", *cross, *past], output_names=["scores", *(f"next_{name}" for name in past)],
        dynamic_shapes=({0: rows}, both, [{0: rows, 2: length}] * len(states), [{0: rows, 2: before}] * len(kept)),
    )  # fmt: skip


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter tells of its own progress and of what it deprecates in itself."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "")
    ]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
