"""The student's own vocabulary, shape and memory of itself."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import label_head_student
from transformers import BertConfig, BertLMHeadModel

from dsbs import DsbsError, Student, UserError
from dsbs.config import DataSection, StudentSection, TaskSection
from dsbs.students.backends import GeneratedText, omp_threads
from dsbs.students.card import CARD, Start, StudentCard, Target, architecture_of
from dsbs.students.tokenizer import learn_vocabulary, load_tokenizer, tokenizer_hash
from dsbs.students.weights import load_model, new_model

TEXTS = [f"Premise {i}: a man with {i} dogs walks. ( {i}.0 * 2.0 ) {{x}}" for i in range(200)]


def make_student(
    seed: int = 0, prefixes: dict[Target, str] | None = None, *, words: Sequence[str] = ()
) -> Student:
    """A small student. ``words``: texts that its vocabulary has besides ``TEXTS``."""
    tokenizer = learn_vocabulary([*TEXTS, *words], 300)
    task = TaskSection(name="classification", labels=("a", "b"), data=DataSection(train="x.csv"))
    card = StudentCard(
        name="s",
        method="finetune",
        labels="gold",
        seed=seed,
        task=task,
        prefixes=prefixes or {"label": ""},
        max_input_tokens=64,
        max_target_tokens=32,
    )
    return Student.of(new_model(StudentSection(vocab_size=300), tokenizer, seed), tokenizer, card)


def test_a_learned_vocabulary_knows_every_character_of_its_text_and_agrees_with_sentencepiece() -> (
    None
):
    tokenizer = learn_vocabulary(TEXTS, 300)
    assert 100 < len(tokenizer) <= 300
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_same_text_gives_the_same_vocabulary() -> None:
    assert tokenizer_hash(learn_vocabulary(TEXTS, 300)) == tokenizer_hash(
        learn_vocabulary(TEXTS, 300)
    )
    assert tokenizer_hash(learn_vocabulary(TEXTS, 300)) != tokenizer_hash(
        learn_vocabulary(TEXTS[:100], 300)
    )


def test_a_saved_student_loads_with_the_same_weights_and_tokenizer_and_answers_the_same(
    tmp_path: Path,
) -> None:
    student = make_student()
    student.save(tmp_path)
    loaded = Student.load(tmp_path)
    assert tokenizer_hash(loaded.backend.tokenizer) == tokenizer_hash(student.backend.tokenizer)
    before, after = (
        student.predict(["a man walks", "dogs"]),
        loaded.predict(["a man walks", "dogs"]),
    )
    assert [a.raw for a in before] == [a.raw for a in after]
    assert loaded.card == student.card


def test_initial_weights_depend_on_the_seed_alone() -> None:
    a, b, c = make_student(0), make_student(0), make_student(1)
    name = "shared.weight"
    assert (a.backend.model.state_dict()[name] == b.backend.model.state_dict()[name]).all()
    assert not (a.backend.model.state_dict()[name] == c.backend.model.state_dict()[name]).all()


def test_batches_do_not_change_answers_or_their_order() -> None:
    student = make_student()
    texts = ["dogs", "a man with 7 dogs walks", "x", "Premise 3: a man"]
    assert [a.raw for a in student.predict(texts, batch_size=1)] == [
        a.raw for a in student.predict(texts, batch_size=4)
    ]


LABELS = ["a man", "dogs", "Premise"]


@pytest.fixture(scope="module")
def taught() -> Student:
    """A student trained on three short targets: its texts end, and it is not certain of them."""
    import torch

    student = make_student()
    torch.manual_seed(0)
    inputs = student.backend.tokenizer(TEXTS[:60], padding=True, return_tensors="pt")
    targets = student.backend.tokenizer(
        [LABELS[i % 3] for i in range(60)], padding=True, return_tensors="pt"
    )["input_ids"]
    targets[targets == student.backend.tokenizer.pad_token_id] = -100
    optimizer = torch.optim.AdamW(student.backend.model.parameters(), lr=3e-3)
    student.backend.model.train()
    for _ in range(12):
        student.backend.model(**inputs, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def forced(student: Student, text: str, max_new_tokens: int, start: int) -> tuple[float, bool]:
    """Probability of a text's greedy tokens, one forward pass per token, and whether it ended."""
    import torch

    source = student.backend.tokenizer(
        text, return_tensors="pt", truncation=True, max_length=student.card.max_input_tokens
    )
    ids, total = [start], 0.0
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            logits = student.backend.model(**source, decoder_input_ids=torch.tensor([ids])).logits[
                0, -1
            ]
            ids.append(int(logits.argmax()))
            total += float(torch.log_softmax(logits.double(), -1)[ids[-1]])
            if ids[-1] == student.backend.tokenizer.eos_token_id:
                return math.exp(total), True
    return math.exp(total), False


@pytest.mark.parametrize("budget", [1, 2, 16])
@pytest.mark.parametrize("start", ["pad", "eos"])
def test_a_texts_probability_is_that_of_its_tokens_one_by_one_with_its_end(
    taught: Student, budget: int, start: Start
) -> None:
    texts = [*TEXTS[60:66], "dogs", TEXTS[70] * 9]
    first = {
        "pad": taught.backend.tokenizer.pad_token_id,
        "eos": taught.backend.tokenizer.eos_token_id,
    }[start]
    for batch_size in (1, 3, 8):
        written = taught.generate(texts, budget, batch_size, start, probabilities=True)
        for text, one in zip(texts, written, strict=True):
            probability, ended = forced(taught, text, budget, first)
            assert (
                one.probability == pytest.approx(probability, abs=1e-5)
                and one.truncated is not ended
            )
            assert 0 < probability < 1
    if budget == 16 and start == "pad":
        assert not all(one.truncated for one in written), (
            "none came to its end: nothing after it was left out"
        )


def test_probabilities_stay_with_their_texts_whatever_the_order_and_the_batches(
    taught: Student,
) -> None:
    texts = ["dogs", *TEXTS[60:68], "x"]
    alone = dict(zip(texts, taught.predict(texts, batch_size=1), strict=True))
    for order in (texts[::-1], texts[3:] + texts[:3]):
        for text, answer in zip(order, taught.predict(order, batch_size=4), strict=True):
            assert answer.raw == alone[text].raw and answer.probability == pytest.approx(
                alone[text].probability, abs=1e-5
            )
    assert len({round(answer.probability or 0, 4) for answer in alone.values()}) > 1


def test_no_probability_is_made_where_none_is_asked_for(taught: Student) -> None:
    assert [one.probability for one in taught.generate(["dogs"], 4, 1)] == [None]


def written_by(student: Student, monkeypatch: pytest.MonkeyPatch, *texts: tuple[str, bool]) -> None:
    """Let the student write these texts, each cut by its budget or not, one for each decode."""
    left = iter(texts)

    def generate(
        items: list[str], *_: Any, probabilities: bool = False, **__: Any
    ) -> list[GeneratedText]:
        assert len(items) == 1
        text, truncated = next(left)
        return [GeneratedText(text, truncated, 0.5 if probabilities else None, 1.0)]

    monkeypatch.setattr(student, "generate", generate)


@pytest.mark.parametrize(
    ("target", "rationale", "texts", "expected"),
    [
        # raw, probability, truncated, rationale, rationale_truncated
        ("label", False, [("a", True)], ("a", 0.5, True, None, None)),
        (
            "rationale-then-label",
            False,
            [("So it is. Answer: a", False)],
            ("a", None, False, "So it is.", False),
        ),
        (
            "rationale-then-label",
            True,
            [("So it is. Answer: a", True)],
            ("a", None, True, "So it is.", False),
        ),
        ("rationale-then-label", True, [("So it", True)], ("", None, True, "So it", True)),
        ("rationale-then-label", True, [("Answer: a", False)], ("a", None, False, "", False)),
        ("label-then-rationale", False, [("a Because: so", True)], ("a", None, False, "so", True)),
        ("label-then-rationale", False, [("a Beca", True)], ("a Beca", None, True, "", True)),
        (
            "label-then-rationale",
            True,
            [("a Because: b", True), ("a Because: b c", False)],
            ("a", None, False, "b c", False),
        ),
        ("label-then-rationale", True, [("a", False), ("a", False)], ("a", None, False, "", False)),
    ],
)
def test_what_is_cut_and_what_a_probability_is_of_goes_by_the_sequence(
    target: Target,
    rationale: bool,
    texts: list[tuple[str, bool]],
    expected: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student(prefixes={target: ""})
    written_by(student, monkeypatch, *texts)
    (answer,) = student.predict(["dogs"], rationale=rationale)
    found = (
        answer.raw,
        answer.probability,
        answer.truncated,
        answer.rationale,
        answer.rationale_truncated,
    )
    assert found == expected


def test_a_step_by_step_student_says_of_both_texts_whether_they_were_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student(prefixes={"label": "predict: ", "rationale": "explain: "})
    written_by(student, monkeypatch, ("a", False), ("The text says", True))
    (answer,) = student.predict(["dogs"], rationale=True)
    assert (answer.probability, answer.truncated, answer.rationale, answer.rationale_truncated) == (
        0.5,
        False,
        "The text says",
        True,
    )


def test_a_pretrained_student_comes_from_a_local_folder(tmp_path: Path) -> None:
    make_student().save(tmp_path)
    section = StudentSection(model=str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    model = new_model(section, tokenizer, seed=5)
    assert model.config.vocab_size == len(tokenizer)


def test_sizes_have_about_the_parameters_they_promise() -> None:
    counts = {}
    tokenizer = learn_vocabulary(TEXTS, 300)
    for size in ("nano", "mini", "small"):
        model = new_model(StudentSection(size=size), tokenizer, 0)
        counts[size] = (
            sum(p.numel() for p in model.parameters()) / 1e6
            + (4000 - len(tokenizer)) * model.config.d_model / 1e6
        )
    assert 1.5 < counts["nano"] < 2.5 and 9 < counts["mini"] < 13 and 30 < counts["small"] < 50, (
        counts
    )


@pytest.mark.parametrize("family", ["distilbert", "t5"])
def test_a_label_heads_parameters_are_those_that_a_label_needs(family: str) -> None:
    student = label_head_student(family)
    model = student.backend.model
    model.rationale_decoder = torch.nn.Linear(16, 16)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, torch.ones_like(ids)).sum().backward()
    needed = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert student.backend.parameters == sum(parameter.numel() for parameter in needed)


def test_a_folder_without_a_student_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not contain a student"):
        Student.load(tmp_path)


def test_a_model_that_cannot_be_loaded_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DsbsError, match="local folder"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("kind", "format"), [("seq2seq", "gguf"), ("causal", "onnx")])
def test_a_format_that_nothing_here_reads_is_told(tmp_path: Path, kind: Any, format: Any) -> None:
    card = make_student().card.model_copy(update={"kind": kind, "format": format})
    (tmp_path / CARD).write_text(card.model_dump_json(), encoding="utf-8")
    with pytest.raises(UserError, match=f"{kind} model in {format} format, which dsbs cannot load"):
        Student.load(tmp_path)


def test_a_models_own_code_is_never_run_whatever_stdin_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_student().save(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\n", encoding="utf-8"
    )
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", rows)
    with pytest.raises(DsbsError, match="of type own"):
        Student.load(tmp_path)
    assert not ran.exists() and rows.tell() == 0


def test_an_encoder_is_no_student(tmp_path: Path) -> None:
    shape = {
        "vocab_size": 40,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertLMHeadModel(BertConfig(**shape)).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match=r"is an encoder \(bert\)"):
        load_model(str(tmp_path / "encoder"))
    BertLMHeadModel(BertConfig(**shape, is_decoder=True)).save_pretrained(tmp_path / "decoder")
    assert load_model(str(tmp_path / "decoder")).config.is_decoder


def test_a_configuration_that_is_no_object_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(DsbsError, match=r"cannot load the configuration of student"):
        architecture_of(str(tmp_path))


def test_tokenizing_needs_no_torch() -> None:
    code = (
        "import sys; from dsbs.students.tokenizer import learn_vocabulary; "
        "learn_vocabulary([f'line {i} of text' for i in range(99)], 80)(['x']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_runtimes_tokenizer_counts_as_transformers_own_does(tmp_path: Path) -> None:
    from dsbs.students.tokenizer import load_export_tokenizer, token_ids_of

    tokenizer = make_student().backend.tokenizer
    tokenizer.save_pretrained(tmp_path)
    pieces = load_export_tokenizer(tmp_path, 128)
    for text in (TEXTS[0], "dogs", "", "dogs " * 300):
        assert token_ids_of(pieces, text) == token_ids_of(tokenizer, text)
        assert token_ids_of(pieces, text, special=True) == token_ids_of(
            tokenizer, text, special=True
        )
    assert len(pieces.encode("dogs " * 300).ids) == 128, "inputs are cut as before"
    assert (
        len(token_ids_of(tokenizer, "dogs", special=True))
        == len(token_ids_of(tokenizer, "dogs")) + 1
    )


def test_code_in_a_students_folder_is_never_run_whatever_stdin_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "unheard-of",
                "is_encoder_decoder": True,
                "auto_map": {"AutoConfig": "own.Own"},
            }
        )
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "1")
    with pytest.raises(DsbsError, match="cannot load"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_an_encoder_decoder_that_is_no_t5_is_refused_by_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bart", "is_encoder_decoder": True}), encoding="utf-8"
    )
    for use in (architecture_of, load_tokenizer):
        with pytest.raises(UserError, match="of type bart; a student is a T5"):
            use(str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mt5", "is_encoder_decoder": True}), encoding="utf-8"
    )
    assert architecture_of(str(tmp_path)) == "seq2seq"


@pytest.mark.parametrize(
    "change", [{"prefixes": {}}, {"max_input_tokens": 0}, {"max_target_tokens": 0}]
)
def test_a_card_that_nothing_can_be_predicted_by_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    card = make_student().card.model_dump(mode="json")
    (tmp_path / CARD).write_text(json.dumps(card | change), encoding="utf-8")
    with pytest.raises(UserError, match=f"is not a student card(.|\n)*{next(iter(change))}"):
        Student.load(tmp_path)


def test_a_card_of_another_kind_than_its_model_is_told(tmp_path: Path) -> None:
    student = make_student()
    student.save(tmp_path)
    (tmp_path / CARD).write_text(
        json.dumps(student.card.model_dump(mode="json") | {"kind": "causal"}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="says kind: causal, but the model beside it is seq2seq"):
        Student.load(tmp_path)


@pytest.mark.parametrize(
    ("said", "threads"), [("4", 4), ("4,2", 4), ("", 0), ("many", 0), (None, 0)]
)
def test_onnxruntime_takes_the_outermost_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, said: str | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert omp_threads() == threads


def test_a_t5_writes_greedily_whatever_its_own_generation_settings_say(tmp_path: Path) -> None:
    plain = make_student()
    written = [row.text for row in plain.generate(TEXTS[:3], 12, 2)]
    model = deepcopy(plain.backend.model)
    model.generation_config.min_length = 10
    model.generation_config.no_repeat_ngram_size = 1
    student = Student.of(model, plain.backend.tokenizer, plain.card)
    assert [row.text for row in student.generate(TEXTS[:3], 12, 2)] == written
    student.save(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert "min_length" not in saved and saved["pad_token_id"] == model.config.pad_token_id
