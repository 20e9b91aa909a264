"""CTranslate2 format: for a compiled runtime on CPU or GPU, in float32 or quantized."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from dsbs.errors import UserError
from dsbs.exporting import FLOAT32, convert_ct2, decoder_script, label_view, write_prompt_format
from dsbs.exporting.label_head import (
    check_separator,
    label_head_ct2_problem,
    label_head_script,
    write_ct2,
)
from dsbs.students.backends.ctranslate2 import DECODER_LOADERS, ctranslate2
from dsbs.students.card import StudentCard
from dsbs.students.student import Student

_SCRIPT = '''"""Print the student's output for each line of stdin."""
import sys
from pathlib import Path

import ctranslate2
import tokenizers

here = Path(__file__).resolve().parent
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
model = ctranslate2.Translator(str(here))
sys.stdout.reconfigure(encoding="utf-8")
for line in open(0, encoding="utf-8-sig"):
    pieces = [tokenizer.id_to_token(i) for i in tokenizer.encode({prefix} + line.strip()).ids]
    results = model.translate_batch(
        [pieces],
        target_prefix=[[{start}]],
        beam_size=1,
        min_decoding_length=0,
        max_decoding_length={max_tokens},
        max_input_length=0,  # the tokenizer has truncated, and has kept the end token
    )
    ids = [tokenizer.token_to_id(piece) for piece in results[0].hypotheses[0]]
    print(tokenizer.decode([i for i in ids if i is not None]).strip(), flush=True)
'''
_WRITE = """    results = model.generate_batch(
        [[tokenizer.id_to_token(i) for i in ids]],
        max_length=MAX_TOKENS,
        min_length=0,
        beam_size=1,
        include_prompt_in_result=False,
        end_token=prompt_format["stops"],
    )
    print(tokenizer.decode(results[0].sequences_ids[0]).strip(), flush=True)"""


class Ct2Format:
    """T5 and decoder-only models, by CTranslate2's converter (runtime: Klein et al., 2020)."""

    kinds = ("seq2seq", "causal", "labels")
    quantizations = ("int8", FLOAT32, "int8_float32", "int16", "float16")
    packages = ("ctranslate2", "tokenizers")

    def check(self, student: Student, quantize: str) -> str | None:
        runtime = ctranslate2()
        config = student.backend.model.config
        problem = ct2_problem(student.card, config)
        if problem:
            other = "onnx" if student.card.head == "labels" else "torch"
            raise UserError(
                f"{student.card.name} ({config.model_type}) cannot be exported: {problem}",
                hint=f"use --format {other}",
            )
        check_separator(student)
        if quantize not in runtime.get_supported_compute_types("cpu"):
            return (
                f"this machine's CPU does not compute in {quantize}: the file is smaller, but not "
                "faster"
            )
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        if student.card.head == "labels":
            write_ct2(student, folder, quantize)
            return
        is_decoder = student.card.kind == "causal"
        if is_decoder:
            loader = _decoder_loader(student.backend.model.config.model_type)
        else:
            loader = _t5_loader()
        # The converter scales and quantizes in the model's own memory.
        model = deepcopy(student.backend.model).to("cpu")
        convert_ct2(student, folder, quantize, lambda: loader(model, student.backend.tokenizer))
        if is_decoder:
            write_prompt_format(student, folder)

    def script(self, student: Student, quantize: str) -> str:
        if student.card.head == "labels":
            return label_head_script(student, "ctranslate2")
        if student.card.kind == "causal":
            return decoder_script(
                student,
                imports="import ctranslate2\nimport tokenizers",
                load="model = ctranslate2.Generator(str(here))",
                write=_WRITE,
            )
        view = label_view(student)
        start = student.backend.tokenizer.convert_ids_to_tokens(view.start_id)
        return _SCRIPT.format(
            prefix=repr(view.prefix), start=repr(start), max_tokens=view.max_tokens
        )


def _t5_loader() -> Any:
    from ctranslate2.converters.transformers import T5Loader

    class Loader(T5Loader):  # type: ignore[misc]
        """The converter's loader, corrected for v1.1 shapes and for both start tokens."""

        def get_model_spec(self, model: Any) -> Any:
            spec = super().get_model_spec(model)
            # The original looks at tied embeddings, which current T5 models always have.
            if not model.config.scale_decoder_outputs:
                spec.decoder.scale_outputs = 1.0
            return spec

        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
            pieces = [piece for piece, _ in vocabulary]
            # Embeddings beyond the vocabulary get names that no piece has.
            unused = range(len(pieces), model.config.vocab_size)
            return pieces + [f"<unused_{index}>" for index in unused]

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            super().set_config(config, model, tokenizer)
            config.decoder_start_token = None  # each call gives the decoder's first token
            config.layer_norm_epsilon = model.config.layer_norm_epsilon

    return Loader()


def ct2_problem(card: StudentCard, config: Any) -> str | None:
    """Why the format ct2 does not support a student whose model has ``config``; None: it does."""
    from dsbs.students.low_rank import KEY

    if card.head == "labels":
        return label_head_ct2_problem(card.kind, config)
    if getattr(config, KEY, None):
        return "it has low-rank matrices, which CTranslate2 does not support"
    if card.kind == "causal" and config.model_type in DECODER_LOADERS:
        feature = _unsupported_feature(config)
        return f"it has {feature}, which CTranslate2's converter ignores" if feature else None
    if config.model_type in ("t5", "mt5"):
        return None
    return f"the format ct2 supports {', '.join(DECODER_LOADERS)} and T5, not {config.model_type}"


def _unsupported_feature(config: Any) -> str | None:
    """A feature of a configuration that the converter silently ignores."""
    if config.model_type == "gpt2":
        if config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx:
            return None
        return "a scaling of attention of its own"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        return "a sliding window"
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    hidden_size = head_size * config.num_attention_heads
    if config.model_type != "qwen3" and hidden_size != config.hidden_size:
        return f"heads of size {head_size}, which is not hidden_size / num_attention_heads"
    return None


def _decoder_loader(model_type: str) -> Any:
    """The converter's loader, corrected for vocabularies with gaps and embeddings beyond them."""
    module = import_module("ctranslate2.converters.transformers")
    base = getattr(module, DECODER_LOADERS[model_type])

    class Loader(base):  # type: ignore[misc,valid-type]
        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
            return [
                pieces.get(index, f"<unused_{index}>") for index in range(model.config.vocab_size)
            ]

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            super().set_config(config, model, tokenizer)
            if config.unk_token is None:
                config.unk_token = ""
            if model_type == "gpt2":
                config.layer_norm_epsilon = model.config.layer_norm_epsilon

    return Loader()
