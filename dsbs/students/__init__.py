"""Students: small models that predict labels and rationales. Importing this loads no torch."""

from dsbs.students.architecture import architecture_of, check_student
from dsbs.students.backends import Backend, BeamSearchBackend, GeneratedText
from dsbs.students.card import CARD, Architecture, Format, Start, StudentCard, Target, read_card
from dsbs.students.formats import (
    InputFormat,
    compose_target,
    new_input_format,
    split_target,
    start_token,
)
from dsbs.students.student import Answer, Student
from dsbs.students.tokenizer import (
    learn_vocabulary,
    load_tokenizer,
    new_tokenizer,
    token_ids_of,
    tokenizer_hash,
    vocabulary_warnings,
)
from dsbs.students.weights import (
    SIZES,
    load_model,
    new_model,
    weights_fingerprint,
    weights_megabytes,
)

__all__ = [
    "CARD",
    "SIZES",
    "Answer",
    "Architecture",
    "Backend",
    "BeamSearchBackend",
    "Format",
    "GeneratedText",
    "InputFormat",
    "Start",
    "Student",
    "StudentCard",
    "Target",
    "architecture_of",
    "check_student",
    "compose_target",
    "learn_vocabulary",
    "load_model",
    "load_tokenizer",
    "new_input_format",
    "new_model",
    "new_tokenizer",
    "read_card",
    "split_target",
    "start_token",
    "token_ids_of",
    "tokenizer_hash",
    "vocabulary_warnings",
    "weights_fingerprint",
    "weights_megabytes",
]
