"""The student: sole owner of its model and its tokenizer. Nothing here imports torch before a model is needed."""

from dsbs.student.card import CARD, Format, Kind, StudentCard, Template, read_card
from dsbs.student.engine import Engine, Said, Searcher, load_engine, make_engine
from dsbs.student.kind import check_student, kind_of
from dsbs.student.prompts import WORDING
from dsbs.student.student import Answer, Student, Written
from dsbs.student.targets import Start, Target, compose, start_token, take_apart
from dsbs.student.tokenizer import ids_of, learn_vocabulary, load_tokenizer, new_tokenizer, tokenizer_hash
from dsbs.student.weights import SIZES, load_model, megabytes, new_model, start_hash
from dsbs.student.wording import Plain, Prompted, Wording, new_wording

__all__ = [
    "CARD",
    "SIZES",
    "WORDING",
    "Answer",
    "Engine",
    "Format",
    "Kind",
    "Plain",
    "Prompted",
    "Said",
    "Searcher",
    "Start",
    "Student",
    "StudentCard",
    "Target",
    "Template",
    "Wording",
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
    "new_model",
    "new_tokenizer",
    "new_wording",
    "read_card",
    "start_hash",
    "start_token",
    "take_apart",
    "tokenizer_hash",
]
