"""ONNX format: an encoder that computes cross-attention keys and values, and a decoder step.

Two graphs, by PyTorch's exporter: a step costs one token however long the text is, and no graph has
a branch for the first step. The exporter does not support caches, so keys and values are plain
tensors. The arithmetic is that of T5 in transformers (Raffel et al., 2020, arXiv:1910.10683); the
golden rows check it.

Shapes: B rows, S input tokens, T tokens so far, H heads, D values per head, V vocabulary entries.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsbs.errors import DsbsError, UserError, needs_extra
from dsbs.exporting import FLOAT32, label_view
from dsbs.exporting.label_head import check_onnx, label_head_script, write_onnx_graph
from dsbs.students.backends.onnxruntime import DECODER, ENCODER, onnxruntime
from dsbs.students.student import Student

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
sys.stdout.reconfigure(encoding="utf-8")
for line in open(0, encoding="utf-8-sig"):
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
    """T5 in v1.0 and v1.1 shapes, and label heads on encoders and on T5's encoder."""

    kinds = ("seq2seq", "labels")
    quantizations = (FLOAT32, "int8")
    packages = ("onnxruntime", "tokenizers", "numpy")

    def check(self, student: Student, quantize: str) -> str | None:
        onnxruntime()
        with needs_extra("onnx", "the format onnx"):
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        if student.card.head == "labels":
            check_onnx(student)
            return None
        model_type = student.backend.model.config.model_type
        if model_type not in ("t5", "mt5"):
            raise UserError(
                f"the format onnx supports T5 only, not {model_type}", hint="try --format torch"
            )
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        try:
            with _quiet_exporter():
                if student.card.head == "labels":
                    write_onnx_graph(student, folder)
                else:
                    _write_graphs(student, folder, quantize)
        except (RuntimeError, AttributeError) as error:  # of PyTorch's exporter
            message = " ".join(str(error).split())[:240]
            raise DsbsError(
                f"PyTorch cannot export {student.card.name} to ONNX "
                f"({type(error).__name__}: {message})",
                hint="try --format ct2 or torch",
            ) from error
        if quantize == "int8":
            from dsbs.exporting.onnx_int8 import quantize_onnx

            with _quiet_exporter():
                for file in folder.glob("*.onnx"):
                    quantize_onnx(file)

    def script(self, student: Student, quantize: str) -> str:
        if student.card.head == "labels":
            return label_head_script(student, "onnxruntime")
        view = label_view(student)
        return _SCRIPT.format(
            prefix=repr(view.prefix),
            start_id=view.start_id,
            max_tokens=view.max_tokens,
            end_id=student.backend.model.config.eos_token_id,
        )


def _write_graphs(student: Student, folder: Path, quantize: str) -> None:
    from torch.export import Dim

    model = deepcopy(student.backend.model).to("cpu").eval()
    model.set_attn_implementation("eager")
    model.config.save_pretrained(folder)
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
        # A tied matrix is transposed as the graph runs, and only constants are quantized.
        DecoderStep(model, untied=quantize != FLOAT32),
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


class CrossStates(torch.nn.Module):
    """token_ids (B, S), mask (B, S) -> keys and values (B, H, S, D) of each cross-attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder: Any = model.encoder
        self.layers: Any = torch.nn.ModuleList(
            block.layer[1].EncDecAttention for block in model.decoder.block
        )

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.encoder.embed_tokens(ids)
        length = ids.shape[1]
        first = self.encoder.block[0].layer[0].SelfAttention
        position = torch.arange(length)
        relative = position[None, :] - position[:, None]
        bias = _position_bias(first, relative, bidirectional=True) + _mask_bias(mask)
        for block in self.encoder.block:
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            keys = _split_heads(attention.k(normed), attention)
            values = _split_heads(attention.v(normed), attention)
            hidden = hidden + _attend(attention, normed, keys, values, bias)
            hidden = block.layer[-1](hidden)
        hidden = self.encoder.final_layer_norm(hidden)
        return tuple(
            _split_heads(matrix(hidden), attention)
            for attention in self.layers
            for matrix in (attention.k, attention.v)
        )


class DecoderStep(torch.nn.Module):
    """One step: token (B, 1), mask (B, S), cross-attention states, cached keys and values.

    The cache is (B, H, T, D) per layer. Returns scores (B, V) and the cache with T + 1 tokens.
    """

    def __init__(self, model: Any, *, untied: bool) -> None:
        super().__init__()
        self.decoder: Any = model.decoder
        self.lm_head: Any = deepcopy(model.lm_head) if untied else model.lm_head
        self.scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(
        self, token: Tensor, mask: Tensor, cross: list[Tensor], past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        hidden = self.decoder.embed_tokens(token)
        past_length = past[0].shape[2]
        first = self.decoder.block[0].layer[0].SelfAttention
        relative = torch.arange(past_length + 1)[None, :] - past_length
        bias = _position_bias(first, relative, bidirectional=False)
        cross_bias = _mask_bias(mask)
        cache: list[Tensor] = []
        for layer, block in enumerate(self.decoder.block):
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            new_keys = _split_heads(attention.k(normed), attention)
            new_values = _split_heads(attention.v(normed), attention)
            keys = torch.cat([past[2 * layer], new_keys], 2)
            values = torch.cat([past[2 * layer + 1], new_values], 2)
            cache += [keys, values]
            hidden = hidden + _attend(attention, normed, keys, values, bias)
            cross_attention = block.layer[1].EncDecAttention
            normed = block.layer[1].layer_norm(hidden)
            hidden = hidden + _attend(
                cross_attention, normed, cross[2 * layer], cross[2 * layer + 1], cross_bias
            )
            hidden = block.layer[-1](hidden)
        return self.lm_head(self.decoder.final_layer_norm(hidden)[:, -1] * self.scale), *cache


def _split_heads(states: Tensor, attention: Any) -> Tensor:
    """(B, T, H·D) -> (B, H, T, D)."""
    return states.view(
        states.shape[0], states.shape[1], -1, attention.key_value_proj_dim
    ).transpose(1, 2)


def _attend(attention: Any, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """normed (B, Q, d), keys and values (B, H, T, D) -> (B, Q, d).

    ``bias`` is broadcast to (B, H, Q, T). T5 does not scale the products.
    """
    queries = _split_heads(attention.q(normed), attention)
    weights = torch.softmax(queries @ keys.transpose(2, 3) + bias, -1)
    context = (weights @ values).transpose(1, 2)
    output: Tensor = attention.o(context.reshape(normed.shape[0], normed.shape[1], -1))
    return output


def _position_bias(attention: Any, relative: Tensor, *, bidirectional: bool) -> Tensor:
    """Relative positions (Q, T), key minus query -> (1, H, Q, T)."""
    buckets = attention._relative_position_bucket(
        relative,
        bidirectional,
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
    )
    bias: Tensor = attention.relative_attention_bias(buckets).permute(2, 0, 1)[None]
    return bias


def _mask_bias(mask: Tensor) -> Tensor:
    """mask (B, S), 1 where there is a token -> (B, 1, 1, S), added to the scores."""
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
