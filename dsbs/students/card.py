"""Student card: ``student.json``, which describes a student and is read without its model; and the
architectures that a student can have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dsbs.config import Recipe, StudentSection, TaskSection, base_of
from dsbs.errors import UserError
from dsbs.students.weights import (
    expand_local,
    gguf_file,
    is_gguf,
    loading_error,
    pretrained_arguments,
    silence_transformers,
)

CARD = "student.json"
# Encoder-decoder (T5), decoder-only (Llama, Qwen) or encoder (BERT, MiniLM, ModernBERT).
Architecture = Literal["seq2seq", "causal", "encoder"]
Head = Literal["text", "labels"]
Runtime = Architecture | Literal["labels"]  # of a student that writes, or of any label head
Template = Literal["plain", "chat"]  # text and line break, or the tokenizer's chat template
Format = Literal["transformers", "ct2", "onnx", "torch", "gguf"]
Target = Literal["label", "rationale", "rationale-then-label", "label-then-rationale"]
# The decoder's first token: T5's padding token, or its end token, which every vocabulary has and no
# other input starts with.
Start = Literal["pad", "eos"]


class StudentCard(BaseModel):
    """What a student needs to know about itself in order to predict."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: str = "dsbs.student/1"
    name: str
    method: str
    labels: str
    """Source of the labels that it learned: gold or teacher."""
    seed: int
    task: TaskSection
    prefixes: dict[Target, str] = Field(min_length=1)
    """Input prefix of each target that it learned. The first target contains the label."""
    starts: dict[Target, Start] = {}
    """First token of the decoder, by target; pad where there is no entry."""
    max_input_tokens: int = Field(gt=0)
    max_target_tokens: int = Field(gt=0)
    kind: Architecture = "seq2seq"
    format: Format = "transformers"
    """Format of the weights in the folder: transformers' own, or an export's."""
    head: Head = "text"
    """Whether it writes its label as text, or chooses it by a linear layer over ``classes``."""
    classes: tuple[str, ...] = ()
    """The labels of a label head, in the order of its outputs."""
    template: Template | None = None
    """How the prompts of a decoder-only student are written. None: it is not decoder-only."""

    @property
    def runtime(self) -> Runtime:
        """What decides the class that loads it, and the formats that it can be exported to."""
        return "labels" if self.head == "labels" else self.kind

    @property
    def explains(self) -> bool:
        """Whether it learned rationales."""
        return set(self.prefixes) != {"label"}

    @property
    def writes_label_alone(self) -> bool:
        """Whether it writes its label as a text of its own, without a rationale beside it."""
        return self.head == "text" and next(iter(self.prefixes)) == "label"

    @property
    def reasons_first(self) -> bool:
        """Whether it writes the label after its rationale, in one sequence."""
        return "rationale-then-label" in self.prefixes


def read_card(path: str | Path) -> StudentCard:
    """Read the card in a student's folder. Raises UserError where there is none."""
    file = Path(path) / CARD
    try:
        return StudentCard.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path} does not contain a student (no {CARD})",
            hint="give a folder such as runs/demo/train/step-by-step-gold-s0",
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file} is not a student card ({error})", hint="train the student again"
        ) from None


# Encoder-decoders with T5's tokenizer, padding and position biases; Flan-T5 is a t5.
_T5_TYPES = ("t5", "mt5")
# Models in which each token attends to later ones, so that they cannot write text.
_ENCODER_TYPES = (
    "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra",
    "ernie", "eurobert", "ibert", "modernbert", "mpnet", "nomic_bert", "nystromformer", "rembert",
    "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


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

    folder = Path(expand_local(source))
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
        is_encoder = config.get("model_type") in _ENCODER_TYPES and not config.get("is_decoder")
        return "encoder" if is_encoder else "causal"
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


def head_of(section: StudentSection, init: str | None = None) -> Head:
    """The head of a recipe's student; ``auto`` is a label head for an encoder, else text."""
    if section.head != "auto":
        return section.head
    return "labels" if architecture_of(init or section.source) == "encoder" else "text"


def check_student(recipe: Recipe, labels: Sequence[str] | None) -> None:
    """Raises UserError for keys that do not apply to the student, and for too many tokens.

    ``labels`` is the task's closed set of labels; None: it has none.
    """
    section = recipe.student
    source = recipe.train.init or section.source
    architecture = architecture_of(source)
    if head_of(section, recipe.train.init) == "labels":
        _check_label_head(recipe, labels)
    elif architecture == "encoder":
        raise UserError(
            f"student.head: text needs a model that writes, and {source} is an encoder",
            hint="remove student.head, or use a T5 or a decoder such as Qwen/Qwen3-0.6B",
        )
    if architecture == "causal":
        _check_decoder(recipe, str(source))
    elif section.template != "auto":
        raise UserError(
            f"student.template: {section.template} is for decoder-only students, and "
            f"{source or 'this student'} is a T5",
            hint="remove student.template",
        )


def _check_label_head(recipe: Recipe, labels: Sequence[str] | None) -> None:
    if labels is None:
        raise UserError(
            f"student.head: labels needs a closed set of labels, and {recipe.task.name} has none",
            hint="use student.head: text, with a T5 or a decoder",
        )
    for name in recipe.train.methods:
        if base_of(name) in ("rationale-then-label", "label-then-rationale"):
            raise UserError(
                f"train.methods: {name} writes its label as text, and student.head is labels",
                hint="remove the method, or use student.head: text",
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
