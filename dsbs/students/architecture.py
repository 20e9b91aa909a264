"""What kind of model a student is made from: told by its configuration, never asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.students.card import Kind
from dsbs.students.gguf import gguf_file, is_gguf
from dsbs.students.weights import local, located, not_loaded, quiet

# Encoder-decoders whose tokenizer, padding and position biases are T5's own; Flan-T5 is a t5.
T5S = ("t5", "mt5")


def kind_of(source: str | None) -> Kind:
    """Of a Hub id, a local folder or a GGUF file; None: a T5 from scratch. Needs no torch. Raises DsbsError, and
    UserError for an encoder-decoder that is no T5."""
    if source is None:
        return "seq2seq"
    if is_gguf(source):
        gguf_file(source)  # where there is none, this says so
        return "causal"
    from transformers.utils.hub import cached_file

    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return "seq2seq"  # a tokenizer alone, or what loading the model will complain of
    quiet()
    try:
        file = cached_file(local(source), "config.json")
        config = dict(json.loads(Path(str(file)).read_text(encoding="utf-8")))
    except Exception as error:  # hub, network and file errors share no root
        raise not_loaded("configuration", source, error) from None
    # T5's and every other encoder-decoder's file says so: transformers' default is the other
    if not config.get("is_encoder_decoder"):
        return "causal"
    if config.get("model_type", "t5") not in T5S:
        raise UserError(
            f"{source} is an encoder-decoder of the type {config['model_type']}, and a student is a T5 or a decoder alone",
            hint="name a T5 (google/t5-v1_1-base, google/flan-t5-base, google/mt5-small) or a decoder such as Qwen/Qwen3-0.6B",
        )
    return "seq2seq"


def positions(source: str) -> int | None:
    """Tokens of prompt and answer together that a causal model has positions for; None: it does not say."""
    from transformers import AutoConfig

    place = located(source)
    try:
        config: Any = AutoConfig.from_pretrained(**place)
    except Exception as error:
        raise not_loaded("configuration", source, error) from None
    return getattr(config, "max_position_embeddings", None)


def check_student(recipe: Recipe) -> None:
    """Raises UserError for keys that the student's kind has no use for, and for more tokens than it has positions for."""
    section, train = recipe.student, recipe.train
    source = train.init or section.source
    if kind_of(source) == "seq2seq":
        if section.template != "auto":
            raise UserError(
                f"student.template: {section.template} belongs to decoder-only students, and {source or 'this one'} is a T5",
                hint="leave student.template out",
            )
        return
    if train.task_token == "decoder":
        raise UserError(
            f"train.task_token: decoder needs a decoder with a start token of its own, and {source} is decoder-only",
            hint="leave train.task_token out: prefixes tell the tasks apart",
        )
    if train.terms:
        raise UserError(
            f"train.terms: further terms of the loss are learned by T5 students alone, and {source} is decoder-only",
            hint="leave train.terms out, and their names out of train.methods",
        )
    most = positions(str(source))
    answer = max(section.max_target_tokens, recipe.eval.max_label_tokens)
    if most is not None and section.max_input_tokens + answer > most:
        longest = (
            "student.max_target_tokens"
            if answer == section.max_target_tokens
            else "eval.max_label_tokens"
        )
        raise UserError(
            f"student.max_input_tokens ({section.max_input_tokens}) and {longest} ({answer}) are together more than the "
            f"{most} tokens that {source} has positions for",
            hint=f"lower one of them: they may have {most} together",
        )
