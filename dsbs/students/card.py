"""Student card: ``student.json``, which describes a student and is read without its model; and the
architectures that a student can have.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dsbs.config import StudentRecipe, StudentSection, TaskSection, base_of
from dsbs.errors import UserError, needs_extra
from dsbs.files import expand_user
from dsbs.students.weights import (
    expand_local,
    gguf_file,
    is_gguf,
    loading_error,
    pretrained_arguments,
    silence_transformers,
)
from dsbs.tasks import Task

CARD = "student.json"
# Encoder-decoder (T5), decoder-only (Llama, Qwen) or encoder (BERT, MiniLM, ModernBERT).
Architecture = Literal["seq2seq", "causal", "encoder"]
Head = Literal["text", "labels"]
Runtime = Architecture | Literal["labels"]  # of a student that writes, or of any label head
Template = Literal["plain", "chat"]  # text and line break, or the tokenizer's chat template
Format = Literal["transformers", "ct2", "onnx", "torch", "gguf"]
Target = Literal["label", "rationale", "rationale-then-label", "label-then-rationale"]
# What begins the second part of a text that has label and rationale.
SECOND_PART = {"rationale-then-label": "Answer:", "label-then-rationale": "Because:"}
# The decoder's first token: T5's padding token, or its end token, which every vocabulary has and no
# other input starts with.
Start = Literal["pad", "eos"]


DEFAULT_LABEL_TOKENS = 64


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
    max_label_tokens: int = Field(
        DEFAULT_LABEL_TOKENS, gt=0, exclude_if=lambda value: value == DEFAULT_LABEL_TOKENS
    )
    """The most tokens that it writes for a label, where nobody asks for another limit."""
    kind: Architecture = "seq2seq"
    format: Format = "transformers"
    """Format of the weights in the folder: transformers' own, or an export's."""
    head: Head = "text"
    """Whether it writes its label as text, or chooses it by a linear layer over ``classes``."""
    classes: tuple[str, ...] = ()
    """The labels of a label head, in the order of its outputs. Empty: each row has its own."""
    template: Template | None = None
    """How the prompts of a decoder-only student are written. None: it is not decoder-only."""

    max_text_tokens: int | None = Field(None, exclude_if=lambda value: value is None)
    """The most tokens of a text without prefix and template, which is cut as ``task.max_input``
    says. None: an input that is too long is cut at its end."""

    @property
    def scores_choices(self) -> bool:
        """Whether it has one output, which scores a row's own choices."""
        return self.head == "labels" and not self.classes

    @property
    def reads_windows(self) -> bool:
        """Whether its label head pools the windows of long texts."""
        return self.max_text_tokens is not None and self.task.max_input.strategy == "windows"

    @property
    def outputs(self) -> int:
        """The outputs of its label head; 0: it writes its label."""
        return 1 if self.scores_choices else len(self.classes)

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
        students = sorted(file.parent for file in Path(path).glob(f"train/*/{CARD}"))
        if students:
            raise UserError(
                f"{path} is a run folder, not a student",
                hint=f"give one of its students, e.g. {students[-1]}; `dsbs predict RECIPE` takes "
                "the best one",
            ) from None
        raise UserError(
            f"{path} does not contain a student (no {CARD})",
            hint="give a folder such as runs/tickets/train/step-by-step-gold-s0",
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file} is not a student card ({error})", hint="train the student again"
        ) from None


_T5_TYPES = ("t5", "mt5")  # Flan-T5 is a t5
_GEMMA_TYPES = ("t5gemma", "t5gemma2")
# Models in which each token attends to later ones, so that they cannot write text.
_ENCODER_TYPES = (
    "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra",
    "ernie", "eurobert", "ibert", "modernbert", "mpnet", "nomic_bert", "nystromformer", "rembert",
    "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def architecture_of(source: str | None) -> Architecture:
    """The architecture of a Hub id, a local folder or a GGUF file; None: a T5 from scratch.

    Needs no torch. Raises DsbsError where the configuration cannot be loaded, and UserError for an
    encoder-decoder other than T5 and T5Gemma.
    """
    if source is None:
        return "seq2seq"
    if is_gguf(source):
        gguf_file(source)  # raises UserError for a missing file
        return "causal"
    config = _config_values(source)
    if config is None:
        return "seq2seq"  # a tokenizer alone; loading a model from it fails with a clear message
    # Every encoder-decoder's file sets this, T5Gemma's aside: the default of transformers is False.
    model_type = config.get("model_type", "t5")
    if not config.get("is_encoder_decoder") and model_type not in _GEMMA_TYPES:
        is_encoder = model_type in _ENCODER_TYPES and not config.get("is_decoder")
        return "encoder" if is_encoder else "causal"
    if model_type not in (*_T5_TYPES, *_GEMMA_TYPES):
        raise UserError(
            f"{source} is an encoder-decoder of type {model_type}; a student is a T5, a T5Gemma, "
            "an encoder or a decoder",
            hint="name a T5 (google/t5-v1_1-base, google/flan-t5-base, google/mt5-small) or a "
            "decoder such as Qwen/Qwen3-0.6B",
        )
    return "seq2seq"


def has_t5_tokenizer(source: str) -> bool:
    """Whether an encoder-decoder has T5's tokenizer, and not Gemma's."""
    config = _config_values(source)
    return config is None or config.get("model_type") not in _GEMMA_TYPES


def _config_values(source: str) -> dict[str, Any] | None:
    """The values of a model's config.json; None: a folder without one. Raises DsbsError."""
    from transformers.utils.hub import cached_file

    folder = Path(expand_local(source))
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None
    silence_transformers()
    try:
        file = cached_file(expand_local(source), "config.json")
        return dict(json.loads(Path(str(file)).read_text(encoding="utf-8")))
    except Exception as error:  # Hub, network and file errors share no root
        raise loading_error("configuration", source, error) from None


def count_parameters(source: str | None) -> int:
    """The parameters of a model, from the headers of its files; 0 where they are not on this disk.

    ``source`` is a Hub id, a local folder or a GGUF file; None: random weights, which are few.
    """
    if source is None:
        return 0
    if is_gguf(source):
        with needs_extra("gguf", "a model from a GGUF file"):
            from gguf import GGUFReader
        return sum(int(tensor.n_elements) for tensor in GGUFReader(gguf_file(source)).tensors)
    folder = Path(expand_local(source))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json")
        if not isinstance(cached, str):
            return 0
        folder = Path(cached).parent
    files = _safetensors_files(folder)
    if not files:  # pickled weights have no header: by their size
        width = 2 if "16" in str(_config(source).dtype) else 4
        return sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin")) // width
    parameters = 0
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        parameters += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return parameters


def _safetensors_files(folder: Path) -> list[Path]:
    """The files that transformers loads; a folder may have the weights in other forms as well."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(shards) if (folder / name).is_file()]
    single_file = folder / "model.safetensors"
    return [single_file] if single_file.is_file() else sorted(folder.glob("*.safetensors"))


# Decoders whose recurrence has no attention mask.
_WITHOUT_MASK = ("recurrent_gemma", "rwkv")
# Types whose first position is the padding token's id + 1.
_OFFSET_TYPES = (
    "camembert", "ibert", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip


def max_positions(source: str) -> int | None:
    """Longest prompt and answer of a decoder together, in tokens; None: the model has no limit."""
    return getattr(_config(source), "max_position_embeddings", None)


def _config(source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**pretrained_arguments(source))
    except Exception as error:  # Hub, network and file errors share no root
        raise loading_error("configuration", source, error) from None


def head_of(section: StudentSection, init: str | None = None) -> Head:
    """The head of a recipe's student; ``auto`` is a label head for an encoder, else text."""
    if section.head != "auto":
        return section.head
    return "labels" if architecture_of(init or section.source) == "encoder" else "text"


def saved_classes(init: str | None) -> tuple[str, ...] | None:
    """The labels of the label head in a student's folder; empty: it scores choices. None: the
    folder has no label head.
    """
    if init is None or not (expand_user(init) / CARD).is_file():
        return None
    card = read_card(expand_user(init))
    return card.classes if card.head == "labels" else None


def new_head_warning(recipe: StudentRecipe, task: Task) -> str | None:
    """The warning that ``train.init`` has a label head that this recipe cannot use, if so."""
    saved = saved_classes(recipe.train.init)
    classes = task.head_labels
    is_used = head_of(recipe.student, recipe.train.init) == "labels"
    if saved is None or not is_used or sorted(saved) == sorted(classes):
        return None
    labels = ", ".join(saved[:5]) + (", …" if len(saved) > 5 else "")
    return (
        f"train.init: the label head in {recipe.train.init} is for "
        f"{labels or 'choices that differ between rows'}, not for this task's labels; students "
        "start with its encoder and a new head"
    )


def input_limit(section: StudentSection, init: str | None = None) -> int:
    """Maximum tokens of an input: ``student.max_input_tokens``, or the positions of an encoder."""
    source = init or section.source
    if source is None or architecture_of(source) != "encoder":
        return section.max_input_tokens
    config = _config(source)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or not getattr(config, "position_biased_input", True):  # DeBERTa
        return section.max_input_tokens
    if config.model_type in _OFFSET_TYPES:  # positions count from the padding token's id on
        positions -= config.pad_token_id + 1
    return min(section.max_input_tokens, int(positions))


def check_student(recipe: StudentRecipe, task: Task) -> None:
    """Raises UserError for keys that do not apply to the student, and for too many tokens."""
    section = recipe.student
    source = recipe.train.init or section.source
    architecture = architecture_of(source)
    head = head_of(section, recipe.train.init)
    reads_windows = task.section.max_input.strategy == "windows"
    if reads_windows and (head == "text" or recipe.train.terms):
        raise UserError(
            "task.max_input.strategy: windows needs a label head, and supports no train.terms",
            hint="use head+tail, or student.head: labels without train.terms",
        )
    _check_field_names(recipe, task)
    if head == "labels":
        _check_label_head(recipe, task)
    elif architecture == "encoder":
        raise UserError(
            f"student.head: text needs a model that writes, and {source} is an encoder",
            hint="remove student.head, or use a T5 or a decoder such as Qwen/Qwen3-0.6B",
        )
    if architecture == "causal":
        _check_decoder(recipe, str(source), head)
    elif section.template != "auto":
        raise UserError(
            f"student.template: {section.template} is for decoder-only students, and "
            f"{source or 'this student'} is not one",
            hint="remove student.template",
        )


def _check_field_names(recipe: StudentRecipe, task: Task) -> None:
    if not task.part_names:
        return
    without_values = task.label_of_parts({})
    for name in recipe.train.methods:
        marker = SECOND_PART.get(base_of(name))
        if marker is not None and marker in without_values:
            raise UserError(
                f"train.methods: {name} separates label and rationale by {marker!r}, and a field "
                "has that name",
                hint="rename the field (task.columns maps names to columns), or remove the method",
            )


def _check_label_head(recipe: StudentRecipe, task: Task) -> None:
    if not task.head_labels and not task.has_choices:
        raise UserError(
            f"student.head: labels needs a closed set of labels, and {task.name} has none",
            hint="use student.head: text, with a T5 or a decoder",
        )
    for name in recipe.train.methods:
        if base_of(name) in ("rationale-then-label", "label-then-rationale"):
            raise UserError(
                f"train.methods: {name} writes its label as text, and student.head is labels",
                hint="remove the method, or use student.head: text",
            )
    if recipe.train.terms and task.has_choices:
        raise UserError(
            f"train.terms: loss terms need labels that all rows share, and those of {task.name} "
            "differ between rows",
            hint="remove train.terms, and their names from train.methods",
        )


def _check_decoder(recipe: StudentRecipe, source: str, head: Head) -> None:
    section = recipe.student
    model_type = str(_config(source).model_type)
    if model_type in _WITHOUT_MASK:
        raise UserError(
            f"student.model: {source} is a {model_type}, which reads the padding of a batch as "
            "text, so that its answers would depend on the rows beside it",
            hint="use another decoder, such as Qwen/Qwen3-0.6B",
        )
    if recipe.train.task_token == "decoder" and head == "text":
        raise UserError(
            "train.task_token: decoder needs a decoder with a start token of its own, and "
            f"{source} is decoder-only",
            hint="remove train.task_token: prefixes distinguish the views",
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
