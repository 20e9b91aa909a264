"""The student: sole owner of its model and its tokenizer. Nothing here imports torch before a model is needed."""

from dsbs.students.architecture import check_student, kind_of
from dsbs.students.backends import Engine, GeneratedText, Searcher, load_engine, make_engine
from dsbs.students.card import CARD, Format, Kind, StudentCard, Template, read_card
from dsbs.students.formats import ChatFormat, InputFormat, PlainFormat, new_input_format
from dsbs.students.instructions import WORDING
from dsbs.students.student import Answer, Student, Written
from dsbs.students.targets import Start, Target, compose, start_token, take_apart
from dsbs.students.tokenizer import (
    ids_of,
    learn_vocabulary,
    load_tokenizer,
    new_tokenizer,
    tokenizer_hash,
)
from dsbs.students.weights import SIZES, load_model, megabytes, new_model, start_hash

__all__ = [
    "CARD",
    "SIZES",
    "WORDING",
    "Answer",
    "ChatFormat",
    "Engine",
    "Format",
    "GeneratedText",
    "InputFormat",
    "Kind",
    "PlainFormat",
    "Searcher",
    "Start",
    "Student",
    "StudentCard",
    "Target",
    "Template",
    "Written",
    "check_student",
    "compose",
    "ids_of",
    "kind_of",
    "learn_vocabulary",
    "load_engine",
    "load_model",
    "load_tokenizer",
    "make_engine",
    "megabytes",
    "new_input_format",
    "new_model",
    "new_tokenizer",
    "read_card",
    "start_hash",
    "start_token",
    "take_apart",
    "tokenizer_hash",
]
