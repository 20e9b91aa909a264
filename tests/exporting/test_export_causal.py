"""Exports of decoder-only students, special tokens and long texts included."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import causal_models
import pytest
import torch
from test_script import BLOCK, NOT_NEEDED, said, said_by_fork
from tiny_t5 import make_student as make_t5
from tiny_t5 import texts

from dsbs.compression.quantize import Quantize
from dsbs.errors import DsbsError, UserError
from dsbs.exporting import gguf
from dsbs.exporting.run import export
from dsbs.students.card import StudentCard
from dsbs.students.student import Student
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import gguf_file, load_model

# One is as long as nothing the template leaves room for, one has the template's own token in it.
ROWS = [
    *texts(13),
    "My parcel is <|over|> and lost.",
    "My invoice number 17 is wrong, it's 3.14. " * 6,
]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A student, trained once per kind and template; only exports are written beside it."""
    there: dict[tuple[str, str], Path] = {}

    def made(into: Path, kind: str = "llama", template: str = "chat") -> Path:
        if (kind, template) not in there:
            folder = tmp_path_factory.mktemp(f"{kind}-{template}")
            causal_models.trained_student(
                template, kind, {"label": "predict: ", "rationale": "explain: "}
            ).save(folder)
            there[kind, template] = folder
        return Path(shutil.copytree(there[kind, template], into / "student"))

    return made


@pytest.fixture(autouse=True)
def _llama_cpp(request: pytest.FixtureRequest) -> None:
    if any(word in request.node.name for word in ("gguf", "llama_cpp")):
        pytest.importorskip("xllamacpp", reason="the extra `local` is not installed")


@pytest.mark.parametrize(
    ("form", "kind", "template"),
    [
        ("ct2", "llama", "chat"),
        ("ct2", "llama", "plain"),
        ("ct2", "qwen2", "plain"),
        ("ct2", "qwen3", "chat"),
        ("ct2", "gpt2", "chat"),
        ("gguf", "llama", "chat"),
        ("gguf", "llama", "plain"),
        ("gguf", "qwen2", "chat"),
        ("gguf", "qwen3", "plain"),
        ("torch", "llama", "chat"),
    ],
)
def test_a_float_export_writes_and_scores_as_transformers_does(
    tmp_path: Path, make: Make, form: str, kind: str, template: str
) -> None:
    student = make(tmp_path, kind, template)
    done = export(student, form, quantize="float32", examples=ROWS)
    assert done.equivalence.rows == len(ROWS) + 12
    assert done.equivalence.greedy_agreement == 1.0
    assert (
        done.equivalence.score_difference is not None and done.equivalence.score_difference < 1e-3
    )
    asked = ["predict: " + row for row in ROWS]
    mine, theirs = (
        Student.load(path).generate(asked, 5, 7, probabilities=True)
        for path in (done.path, student)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert (one.text, one.truncated) == (other.text, other.truncated)
        assert one.probability == pytest.approx(other.probability, rel=1e-3)
        logs = dict(one.tokens), dict(other.tokens)
        assert logs[0] == ({} if form == "ct2" else pytest.approx(logs[1], abs=1e-3)) and logs[1]
    export_backend, backend = (Student.load(path).backend for path in (done.path, student))
    if form != "gguf":
        labels = ["billing", "shipping", "a much longer label"]
        scores, expected = (
            scorer.score(asked, labels)  # type: ignore[attr-defined]
            for scorer in (export_backend, backend)
        )
        for ours, theirs_row in zip(scores, expected, strict=True):
            assert ours == pytest.approx(theirs_row, abs=2e-3)


@pytest.mark.parametrize(
    ("form", "quantize"),
    [
        ("ct2", "int8"),
        ("torch", "int8"),
        ("gguf", "q8_0"),
        ("gguf", "float16"),
        ("gguf", "q4_0"),
        ("gguf", "q4_k_m"),
    ],
)
def test_a_quantized_export_is_smaller_and_near(
    tmp_path: Path, make: Make, form: str, quantize: str
) -> None:
    student = make(tmp_path)
    done = export(student, form, quantize=quantize, examples=ROWS)
    assert done.megabytes < done.student_megabytes
    mine, theirs = (
        [one.text for one in Student.load(path).backend.generate(ROWS, 1)]
        for path in (done.path, student)
    )
    assert sum(one == other for one, other in zip(mine, theirs, strict=True)) / len(ROWS) > 0.6


@pytest.mark.parametrize(
    ("form", "quantize", "refused"),
    [
        ("ct2", "float32", (*NOT_NEEDED, "onnxruntime", "xllamacpp")),
        ("gguf", "float32", (*NOT_NEEDED, "ctranslate2", "gguf")),
        ("torch", "float32", ("dsbs", "ctranslate2")),
    ],
)
def test_the_script_writes_what_transformers_wrote_without_the_rest(
    tmp_path: Path, make: Make, form: str, quantize: str, refused: tuple[str, ...]
) -> None:
    done = export(make(tmp_path), form, quantize=quantize, examples=ROWS)
    golden = [
        json.loads(line)
        for line in (done.path / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [
        (row["input"].removeprefix("predict: "), row["greedy"])
        for row in golden
        if row["target"] == "label"
    ]
    assert len(rows) == len(ROWS)
    command = [
        sys.executable,
        "-I",
        "-c",
        BLOCK.format(refused=refused, script=str(done.path / "predict.py")),
    ]
    assert said(command, rows, tmp_path) == [text for _, text in rows]


def test_the_int8_script_of_torch_writes_what_the_engine_writes(tmp_path: Path, make: Make) -> None:
    done = export(make(tmp_path), "torch", quantize="int8", examples=ROWS)
    engine = Student.load(done.path).backend
    written = [
        engine.generate(["predict: " + row.strip()], 16)[0].text for row in ROWS
    ]  # one by one: its scales are a batch's
    assert said_by_fork(done.path / "predict.py", ROWS, tmp_path) == written


@pytest.mark.parametrize("form", ["ct2-int8", "gguf-q8_0", "torch-int8"])
def test_an_engine_saves_what_it_loads(tmp_path: Path, make: Make, form: str) -> None:
    name, _, quantize = form.partition("-")
    first = Student.load(export(make(tmp_path), name, quantize=quantize, examples=ROWS).path)
    (tmp_path / "copy").mkdir()
    first.save(tmp_path / "copy")
    written = [
        [one.text for one in student.backend.generate(ROWS, 8)]
        for student in (first, Student.load(tmp_path / "copy"))
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("kind", "quantize"), [("llama", "float32"), ("qwen2", "float32"), ("llama", "float16")]
)
def test_a_gguf_file_holds_the_students_weights_and_its_tokenizer(
    tmp_path: Path, make: Make, kind: str, quantize: str
) -> None:
    student = make(tmp_path, kind)
    folder = str(export(student, "gguf", quantize=quantize, examples=ROWS).path / "model.gguf")
    (tmp_path / "alone").mkdir()
    file = str(shutil.copy(folder, tmp_path / "alone"))
    ours, theirs = load_model(str(student)).state_dict(), load_model(file).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        kept = tensor.half().float() if quantize == "float16" and tensor.ndim > 1 else tensor
        assert torch.equal(theirs[name], kept), name
    mine, near, other = load_tokenizer(str(student)), load_tokenizer(folder), load_tokenizer(file)
    text = "My parcel, it's number 17!<|over|>\n"
    assert other(text)["input_ids"] == near(text)["input_ids"] == mine(text)["input_ids"]
    assert near.eos_token == mine.eos_token
    assert other.convert_tokens_to_ids("<|over|>") == other.eos_token_id, (
        "what ends a turn ends its answers"
    )


def test_gguf_types_are_those_of_llama_cpps_quantizer() -> None:
    def types(name: str, width: int, quantize: str, *, tied: bool = True, layers: int = 12) -> str:
        config = SimpleNamespace(tie_word_embeddings=tied, num_hidden_layers=layers)
        return str(gguf.tensor_type(name, (8, width), config, quantize).name)

    assert types("blk.0.attn_q.weight", 512, "q4_0") == "Q4_0"
    assert types("token_embd.weight", 512, "q4_0") == "Q6_K"
    assert types("token_embd.weight", 512, "q4_0", tied=False) == "Q4_0"
    assert types("output.weight", 512, "q4_0", tied=False) == "Q6_K"
    assert types("blk.0.attn_k.weight", 512, "q4_k_m") == "Q4_K"
    more = [types(f"blk.{i}.ffn_down.weight", 512, "q4_k_m") == "Q6_K" for i in range(12)]
    assert [i for i, has_more in enumerate(more) if has_more] == [0, 3, 6, 9, 10, 11]
    # SmolLM2-135M's rows of 576 values are no multiple of 256
    assert types("blk.1.attn_v.weight", 576, "q4_k_m") == "Q5_0"
    assert types("token_embd.weight", 576, "q4_k_m") == "Q8_0"
    assert types("blk.1.attn_q.weight", 40, "q4_k_m") == "F16"


def test_gguf_matrices_of_4_and_6_bits_come_from_llama_cpp(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    matrix = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    # the types that the package gguf can quantize, too, prove that the C function is called well
    monkeypatch.setattr(gguf, "_NARROWER_BLOCKS", dict.fromkeys(("Q4_K", "Q6_K", "Q4_0"), "F16"))
    of_package = quants.quantize(matrix, GGMLQuantizationType.Q4_0)
    assert (gguf.quantized(matrix, GGMLQuantizationType.Q4_0) == of_package).all()
    for name, error in (("Q4_K", 0.1), ("Q6_K", 0.025)):
        data_type = GGMLQuantizationType[name]
        restored = quants.dequantize(gguf.quantized(matrix, data_type), data_type)
        assert float(np.sqrt(((restored - matrix) ** 2).mean())) < error
    monkeypatch.setattr(gguf, "llama_quantizer", lambda: None)
    with pytest.raises(UserError, match="q4_k_m needs llama"):
        export(make(tmp_path), "gguf", quantize="q4_k_m", examples=ROWS)


def test_llama_cpps_chat_asks_a_gguf_student_as_it_was_trained(tmp_path: Path, make: Make) -> None:
    student = make(tmp_path)
    served: Any = Student.load(
        export(student, "gguf", quantize="float32", examples=ROWS).path
    ).backend
    for text, one in zip(
        ROWS[:5], Student.load(student).backend.generate(ROWS[:5], 16), strict=True
    ):
        wanted = {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 16,
        }
        assert (
            served.model.handle_chat_completions(wanted)["choices"][0]["message"]["content"].strip()
            == one.text
        )


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_found_out(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make(tmp_path)
    monkeypatch.setattr(gguf, "_pre_tokenizer", lambda student: "smollm")  # which parts digits
    with pytest.raises(DsbsError, match="tokenizes the prompts of s differently"):
        export(student, "gguf", examples=ROWS)
    assert not (student / "export" / "gguf-float16").exists()


def altered(student: Path, **changes: Any) -> Path:
    """The student with another configuration."""
    file = student / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return student


@pytest.mark.parametrize(
    ("form", "quantize", "kind", "changes", "words", "hint"),
    [
        (
            "onnx",
            None,
            "llama",
            {},
            "a causal model, which the format onnx does not support",
            "ct2",
        ),
        ("gguf", None, "gpt2", {}, "llama, qwen2, qwen3, not gpt2", "ct2"),
        ("gguf", None, "llama", {"hidden_act": "gelu"}, "the activation gelu", "ct2"),
        ("ct2", None, "llama", {"hidden_act": "gelu"}, "the activation gelu", "torch"),
        (
            "ct2",
            None,
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "a scaling of attention of its own",
            "torch",
        ),
        ("torch", "int8", "gpt2", {}, "whose matrices PyTorch does not quantize", "ct2"),
    ],
)
def test_what_a_format_does_not_carry_is_refused_with_another_one(
    tmp_path: Path,
    make: Make,
    form: str,
    quantize: str | None,
    kind: str,
    changes: dict[str, Any],
    words: str,
    hint: str,
) -> None:
    student = altered(make(tmp_path, kind), **changes)
    with pytest.raises(UserError, match=words) as caught:
        export(student, form, quantize=quantize, examples=ROWS)
    assert hint in caught.value.hint


def test_a_t5_goes_into_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="a seq2seq model, which the format gguf does not support"
    ) as caught:
        export(make_t5(tmp_path), "gguf")
    assert "ct2" in caught.value.hint


@pytest.mark.parametrize(
    ("package", "extra"), [("gguf", "dsbs[gguf]"), ("xllamacpp", "dsbs[local]")]
)
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    student = make(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=package) as caught:
        export(student, "gguf")
    assert extra in caught.value.hint


@pytest.mark.parametrize(("kind", "form"), [("llama", "ct2"), ("gpt2", "ct2")])
def test_compress_quantizes_a_decoder_by_ctranslate2(
    tmp_path: Path, make: Make, kind: str, form: str
) -> None:
    assert Quantize("int8").export_format(make(tmp_path, kind)) == form


@pytest.mark.slow
def test_smollm2_says_the_same_in_ctranslate2_and_in_llama_cpp(tmp_path: Path) -> None:
    try:
        source = str(gguf_file("smollm2-135m-instruct"))
    except UserError as missing:
        pytest.skip(str(missing))
    tiny = causal_models.trained_student().card
    card = StudentCard.model_validate(
        tiny.model_dump()
        | {"prefixes": {"label": ""}, "max_input_tokens": 96, "max_target_tokens": 12}
    )
    student = Student.of(load_model(source), load_tokenizer(source), card)
    student.save(tmp_path / "student")
    asked = [
        f"Is a {thing} an animal? Say yes or no."
        for thing in ("dog", "car", "cat", "house", "bird", "stone")
    ]
    for form in ("ct2", "gguf"):
        done = export(tmp_path / "student", form, quantize="float32", examples=asked)
        assert (
            done.equivalence.greedy_agreement == 1.0
            and done.equivalence.score_difference is not None
        )
        assert done.equivalence.score_difference < 5e-3
        shutil.rmtree(done.path)
