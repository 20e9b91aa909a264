"""Registries: every kind of thing that a recipe or a command can name, as a "module:name" string.

To add a kind, write its module and add one line here. A module is imported only when its kind is
used, so that validating a recipe and printing ``--help`` need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

Key = TypeVar("Key")

# `task.name`: a subclass of dsbs.tasks.Task.
TASKS = {
    "classification": "dsbs.tasks.classification:Classification",
    "multilabel": "dsbs.tasks.multilabel:Multilabel",
    "score": "dsbs.tasks.score:Score",
    "extraction": "dsbs.tasks.extraction:Extraction",
    "generation": "dsbs.tasks.generation:Generation",
    "svamp": "dsbs.tasks.svamp:Svamp",
    "cqa": "dsbs.tasks.cqa:Cqa",
    "anli": "dsbs.tasks.nli:Anli",
    "esnli": "dsbs.tasks.nli:Esnli",
}

# `teacher.kind`: a class that is constructed from the recipe.
TEACHERS = {
    "openai": "dsbs.annotation.backends.openai:OpenAITeacher",
    "llamacpp": "dsbs.annotation.backends.llamacpp:LlamaCppTeacher",
    "transformers": "dsbs.annotation.backends.transformers:TransformersTeacher",
    "recorded": "dsbs.annotation.backends.recorded:RecordedTeacher",
    "human": "dsbs.annotation.backends.recorded:HumanTeacher",
    "ensemble": "dsbs.annotation.backends.ensemble:EnsembleTeacher",
}

# `train.methods`: a record, dsbs.training.methods.Method.
METHODS = {
    "step-by-step": "dsbs.training.methods:STEP_BY_STEP",
    "finetune": "dsbs.training.methods:FINETUNE",
    "distill": "dsbs.training.methods:DISTILL",
    "rationale-then-label": "dsbs.training.methods:RATIONALE_THEN_LABEL",
    "label-then-rationale": "dsbs.training.methods:LABEL_THEN_RATIONALE",
}

# `kind` of an entry in `train.terms`: a subclass of dsbs.training.distillation.Term.
TERMS = {
    "response": "dsbs.training.distillation.response:ResponseTerm",
    "labels": "dsbs.training.distillation.labels:LabelsTerm",
    "feature": "dsbs.training.distillation.feature:FeatureTerm",
    "relation": "dsbs.training.distillation.relation:RelationTerm",
}

# Names in `metrics` of results.json, in the order in which they are shown: a record,
# dsbs.evaluation.metrics.Metric.
METRICS = {
    "exact_match_raw": "dsbs.evaluation.metrics:EXACT_MATCH_RAW",
    "exact_match": "dsbs.evaluation.metrics:EXACT_MATCH",
    "equation_string": "dsbs.evaluation.metrics:EQUATION_STRING",
    "equation_value": "dsbs.evaluation.metrics:EQUATION_VALUE",
    "parse_failure": "dsbs.evaluation.metrics:PARSE_FAILURE",
    "quadratic_kappa": "dsbs.evaluation.metrics_of_scores:QUADRATIC_KAPPA",
    "spearman": "dsbs.evaluation.metrics_of_scores:SPEARMAN",
    "mae": "dsbs.evaluation.metrics_of_scores:MEAN_ABSOLUTE_ERROR",
    "within_one": "dsbs.evaluation.metrics_of_scores:WITHIN_ONE",
    "micro_f1": "dsbs.evaluation.metrics_of_parts:MICRO_F1",
    "macro_f1": "dsbs.evaluation.metrics_of_parts:MACRO_F1",
    "micro_precision": "dsbs.evaluation.metrics_of_parts:MICRO_PRECISION",
    "micro_recall": "dsbs.evaluation.metrics_of_parts:MICRO_RECALL",
    "hamming": "dsbs.evaluation.metrics_of_parts:HAMMING",
    "not_in_input": "dsbs.evaluation.metrics_of_parts:NOT_IN_INPUT",
    "log_loss": "dsbs.evaluation.calibration:LOG_LOSS",
    "brier": "dsbs.evaluation.calibration:BRIER",
    "confidence_auroc": "dsbs.evaluation.calibration:CONFIDENCE_AUROC",
    "ece": "dsbs.evaluation.calibration:ECE",
    "rouge_l": "dsbs.evaluation.rationales:ROUGE_L",
    "rationale_empty": "dsbs.evaluation.rationales:RATIONALE_EMPTY",
    "rationale_truncated": "dsbs.evaluation.rationales:RATIONALE_TRUNCATED",
    "consistency": "dsbs.evaluation.rationales:CONSISTENCY",
}

# `eval.floors`: a record, dsbs.evaluation.floors.Floor.
FLOORS = {
    "majority": "dsbs.evaluation.floors:MAJORITY",
    "tfidf": "dsbs.evaluation.tfidf:TFIDF",
    "untrained": "dsbs.evaluation.untrained:UNTRAINED",
}

# `dsbs compress --method NAME=VALUE`: a class that is constructed from the value, and raises
# UserError for a wrong one.
COMPRESSION_STEPS = {
    "quantize": "dsbs.compression.quantize:Quantize",
    "prune-heads": "dsbs.compression.pruning:PruneHeads",
    "prune-ff": "dsbs.compression.pruning:PruneFeedForward",
    "magnitude": "dsbs.compression.pruning:Magnitude",
    "drop-layers": "dsbs.compression.layers:DropLayers",
    "low-rank": "dsbs.compression.low_rank:LowRankStep",
}

# `dsbs export --format`: a class without arguments, dsbs.exporting.ExportFormat.
EXPORT_FORMATS = {
    "ct2": "dsbs.exporting.ct2:Ct2Format",
    "gguf": "dsbs.exporting.gguf:GgufFormat",
    "onnx": "dsbs.exporting.onnx:OnnxFormat",
    "torch": "dsbs.exporting.torch:TorchFormat",
}

# (kind, format) of a student's card, or ("labels", format) for a label head: a class with
# `load(path, card)`, dsbs.students.backends.
BACKENDS = {
    ("seq2seq", "transformers"): "dsbs.students.backends.transformers:EncoderDecoderBackend",
    ("causal", "transformers"): "dsbs.students.backends.transformers:DecoderBackend",
    ("labels", "transformers"): "dsbs.students.backends.label_head:LabelHeadBackend",
    ("labels", "ct2"): "dsbs.students.backends.label_head:CTranslate2LabelHeadBackend",
    ("labels", "onnx"): "dsbs.students.backends.label_head:OnnxLabelHeadBackend",
    ("seq2seq", "ct2"): "dsbs.students.backends.ctranslate2:CTranslate2Backend",
    ("causal", "ct2"): "dsbs.students.backends.ctranslate2:CTranslate2DecoderBackend",
    ("causal", "gguf"): "dsbs.students.backends.llama_server:LlamaServerBackend",
    ("seq2seq", "onnx"): "dsbs.students.backends.onnxruntime:OnnxBackend",
    ("causal", "torch"): "dsbs.students.backends.transformers:Int8DecoderBackend",
    ("seq2seq", "torch"): "dsbs.students.backends.transformers:Int8EncoderDecoderBackend",
}


def resolve(spec: str) -> Any:
    """Import the object that a "module:name" string names."""
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)


def entry(registry: Mapping[Key, str], key: Key) -> Any:
    """The record or class that ``registry`` names under ``key``. Raises KeyError for an unknown
    key.
    """
    return resolve(registry[key])


def module_of(registry: Mapping[Key, str], key: Key) -> Any:
    """The module in which the record or class of ``key`` is. Raises KeyError for an unknown key."""
    return import_module(registry[key].partition(":")[0])
