"""Architecture: encoder-decoder or decoder-only, detected from config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.students.card import Architecture
from dsbs.students.weights import (
    expand_local,
    gguf_file,
    is_gguf,
    loading_error,
    pretrained_arguments,
    silence_transformers,
)

# Encoder-decoders with T5's tokenizer, padding and position biases; Flan-T5 is a t5.
_T5_TYPES = ("t5", "mt5")


def architecture_of(source: str | None) -> Architecture:
    """The architecture of a Hub id, a local folder or a GGUF file; None: a T5 from scratch.

    Needs no torch. Raises DsbsError where the configuration cannot be loaded, and UserError for an
    encoder-decoder other than T5.
    """
    if source is None:
        return "seq2seq"
    if is_gguf(source):
        gguf_file(source)  # raises UserError for a missing file
        return "causal"
    from transformers.utils.hub import cached_file

    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return "seq2seq"  # a tokenizer alone; loading a model from it fails with a clear message
    silence_transformers()
    try:
        file = cached_file(expand_local(source), "config.json")
        config = dict(json.loads(Path(str(file)).read_text(encoding="utf-8")))
    except Exception as error:  # Hub, network and file errors share no root
        raise loading_error("configuration", source, error) from None
    # Every encoder-decoder's file sets this: the default of transformers is False.
    if not config.get("is_encoder_decoder"):
        return "causal"
    if config.get("model_type", "t5") not in _T5_TYPES:
        raise UserError(
            f"{source} is an encoder-decoder of type {config['model_type']}; a student is a T5 or "
            "a decoder",
            hint="name a T5 (google/t5-v1_1-base, google/flan-t5-base, google/mt5-small) or a "
            "decoder such as Qwen/Qwen3-0.6B",
        )
    return "seq2seq"


def max_positions(source: str) -> int | None:
    """Longest prompt and answer of a decoder together, in tokens; None: the model has no limit."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(**pretrained_arguments(source))
    except Exception as error:
        raise loading_error("configuration", source, error) from None
    return getattr(config, "max_position_embeddings", None)


def check_student(recipe: Recipe) -> None:
    """Raises UserError for keys that do not apply to the student, and for too many tokens."""
    section = recipe.student
    source = recipe.train.init or section.source
    if architecture_of(source) == "causal":
        _check_decoder(recipe, str(source))
    elif section.template != "auto":
        raise UserError(
            f"student.template: {section.template} is for decoder-only students, and "
            f"{source or 'this student'} is a T5",
            hint="remove student.template",
        )


def _check_decoder(recipe: Recipe, source: str) -> None:
    section = recipe.student
    if recipe.train.task_token == "decoder":
        raise UserError(
            "train.task_token: decoder needs a decoder with a start token of its own, and "
            f"{source} is decoder-only",
            hint="remove train.task_token: prefixes distinguish the views",
        )
    if recipe.train.terms:
        raise UserError(
            f"train.terms: only T5 students learn further loss terms, and {source} is decoder-only",
            hint="remove train.terms, and their names from train.methods",
        )
    limit = max_positions(source)
    answer_tokens = max(section.max_target_tokens, recipe.eval.max_label_tokens)
    if limit is None or section.max_input_tokens + answer_tokens <= limit:
        return
    answer_key = "eval.max_label_tokens"
    if answer_tokens == section.max_target_tokens:
        answer_key = "student.max_target_tokens"
    raise UserError(
        f"student.max_input_tokens ({section.max_input_tokens}) and {answer_key} "
        f"({answer_tokens}) are together more than the {limit} tokens that {source} supports",
        hint=f"lower one of them, so that their sum is at most {limit}",
    )
