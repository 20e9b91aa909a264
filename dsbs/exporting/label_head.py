"""Label heads in export formats: one ONNX graph, or CTranslate2's encoder with a head in NumPy.

Shapes: B rows, S input tokens, D hidden size, L labels.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from dsbs.errors import UserError
from dsbs.exporting import convert_ct2
from dsbs.students.backends.label_head import GRAPH, HEAD
from dsbs.students.card import Architecture
from dsbs.students.formats import PAIR_SEPARATOR
from dsbs.students.student import Student

_SCRIPT = '''"""Print each stdin line's label and the probability of every label, as JSON."""
import json, pathlib
import {runtime}, numpy as np, tokenizers
here = pathlib.Path(__file__).resolve().parent
labels = json.loads((here / "student.json").read_text(encoding="utf-8"))["classes"]
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
{load}
for line in open(0, encoding="utf-8-sig"):
    ids = np.array([tokenizer.encode({read}).ids])
{run}
{answer}
    print(json.dumps(answer), flush=True)
'''
_ONNX_LOAD = 'session = onnxruntime.InferenceSession(str(here / "model.onnx"))'
_ONNX_RUN = (
    """    p = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]"""
)
_CT2_LOAD = """model, head = ctranslate2.Encoder(str(here)), np.load(here / "head.npz")"""
_CT2_RUN = """\
    second = (np.cumsum(e := ids == head["separator"], 1) - e > 0).astype(int)
    states = model.forward_batch(ids.tolist(), token_type_ids=second.tolist()).last_hidden_state
{shares}"""
_CT2_STATES = """np.array(states)[0].mean(0) @ head["weight"].T + head["bias"]"""
_CT2_SHARES = f"    p = np.exp((z := {_CT2_STATES}) - z.max())"
_CT2_EACH = f"    p = 1 / (1 + np.exp(-({_CT2_STATES})))"
# By how a task chooses its answer: from the probabilities p of the labels, in their order.
_LIKELIEST = """\
    rows = sorted(zip(labels, ({calibrated}).tolist()), key=lambda row: -row[1])
    answer = {{"label": rows[0][0], "probability": rows[0][1], "distribution": dict(rows)}}"""
_MEDIAN = """\
    p = {calibrated}
    point = int(np.searchsorted(np.cumsum(p), p.sum() / 2))
    answer = {{"label": json.loads(labels[point]), "probability": float(p[point])}}
    answer |= {{"expected_number": float(p @ np.array(labels, float))}}
    answer |= {{"distribution": dict(zip(labels, p.tolist()))}}"""
_REACHED = """\
    p = {calibrated}
    given = p >= np.array({limits})
    answer = {{"label": sorted(label for label, is_given in zip(labels, given) if is_given)}}
    answer |= {{"probability": float(np.where(given, p, 1 - p).min())}}
    answer |= {{"distribution": dict(zip(labels, p.tolist()))}}"""
# CTranslate2's converter for the encoder of each model type.
CT2_LOADERS = {
    "bert": "BertLoader",
    "camembert": "CamembertLoader",
    "distilbert": "DistilBertLoader",
    "roberta": "RobertaLoader",
    "xlm-roberta": "RobertaLoader",  # its own reads a classifier of transformers
}


def check_onnx(student: Student) -> None:
    """Raises UserError for a label head that is not exported to ONNX."""
    if student.card.kind == "causal":
        raise UserError(
            f"{student.card.name} is a decoder with a label head, which no export format supports",
            hint="serve the student itself, or train an encoder such as minilm-l6",
        )
    check_separator(student)


def check_separator(student: Student) -> None:
    """Raises UserError for an encoder of which an export would read pairs of texts differently."""
    if student.card.kind == "encoder" and student.backend.tokenizer.sep_token_id is None:
        raise UserError(
            f"{student.card.name} cannot be exported: its tokenizer has no separator token between "
            "the two texts of a pair",
            hint="serve the student itself, or train an encoder such as minilm-l6",
        )


def write_onnx_graph(student: Student, folder: Path) -> None:
    import torch
    from torch import Tensor
    from torch.export import Dim

    model = deepcopy(student.backend.model).to("cpu").eval()
    model.rationale_decoder = None
    has_several = student.task.has_several_labels
    # Its graph is smaller than that of fused attention, and ONNX Runtime fuses it again.
    model.body.set_attn_implementation("eager")

    class Probabilities(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            """input_ids and attention_mask (B, S) -> (B, L)."""
            logits: Tensor = self.model(input_ids, attention_mask)
            return logits.sigmoid() if has_several else logits.softmax(-1)

    token_ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    shape = {0: Dim("rows"), 1: Dim("length")}
    torch.onnx.export(
        Probabilities(),
        (token_ids, mask),
        folder / GRAPH,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["probabilities"],
        dynamic_shapes=(shape, shape),
    )


def label_head_ct2_problem(kind: Architecture, config: Any) -> str | None:
    """Why CTranslate2 cannot run a label head on a model of ``kind``; None: it can."""
    from dsbs.students.encoder_shapes import HEADS
    from dsbs.students.low_rank import KEY

    if kind != "encoder" or config.model_type not in CT2_LOADERS:
        return f"the format ct2 supports label heads on {', '.join(CT2_LOADERS)}"
    if getattr(config, KEY, None) or getattr(config, HEADS, None):
        return "CTranslate2 does not support low-rank matrices and removed heads"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return "CTranslate2 does not support relative positions"
    return None


def write_ct2(student: Student, folder: Path, quantize: str) -> None:
    import numpy as np

    model = student.backend.model
    body = deepcopy(model.body).to("cpu")
    if getattr(body.config, "position_embedding_type", None) is None:
        body.config.position_embedding_type = "absolute"  # which the converter reads
    loader = _ct2_loader(body.config.model_type)
    convert_ct2(student, folder, quantize, lambda: loader(body, student.backend.tokenizer))
    separator = -1  # no token
    if getattr(body.config, "type_vocab_size", 0) > 1:
        separator = body.config.sep_token_id
    head = model.classifier
    np.savez(
        folder / HEAD,
        weight=head.weight.detach().cpu().numpy(),
        bias=head.bias.detach().cpu().numpy(),
        separator=np.array(separator),
    )


def _ct2_loader(model_type: str) -> Any:
    """The converter's loader, corrected for a RoBERTa whose padding token is 0."""
    module = import_module("ctranslate2.converters.transformers")
    base = getattr(module, CT2_LOADERS[model_type])

    class Loader(base):  # type: ignore[misc,valid-type]
        def set_position_encodings(self, spec: Any, table: Any) -> None:
            first = 0
            if model_type in ("camembert", "roberta", "xlm-roberta"):
                first = table.padding_idx + 1
            spec.encodings = table.weight[first:]

    return Loader()


def label_head_script(student: Student, runtime: str) -> str:
    """``predict.py``. ``runtime`` is the package: onnxruntime or ctranslate2."""
    card = student.card
    prefix = next(iter(card.prefixes.values()))
    text = f"{prefix!r} + line.strip()" if prefix else "line.strip()"
    if card.kind == "encoder":
        text = f"*({text}).split({PAIR_SEPARATOR!r}, 1)"
    is_onnx = runtime == "onnxruntime"
    shares = _CT2_EACH if student.task.has_several_labels else _CT2_SHARES
    return _SCRIPT.format(
        runtime=runtime,
        load=_ONNX_LOAD if is_onnx else _CT2_LOAD,
        run=_ONNX_RUN if is_onnx else _CT2_RUN.replace("{shares}", shares),
        read=text,
        answer=_script_answer(student),
    )


def _script_answer(student: Student) -> str:
    """The lines of ``predict.py`` that make an answer of the probabilities, as ``Student`` does."""
    task = student.task
    power = f"{1 / student.temperature:.6g}"
    if task.has_several_labels:
        thresholds = student.label_thresholds or {}
        limits = [thresholds.get(label, 0.5) for label in student.card.classes]
        return _REACHED.format(
            calibrated=f"p**{power} / (p**{power} + (1 - p) ** {power})",
            limits=[2.0 if limit is None else limit for limit in limits],  # 2: never reached
        )
    calibrated = "p / p.sum()"
    if student.temperature != 1:
        calibrated = f"(p / p.max()) ** {power} / ((p / p.max()) ** {power}).sum()"
    is_scale = task.number(student.card.classes[0]) is not None
    return (_MEDIAN if is_scale else _LIKELIEST).format(calibrated=calibrated)
