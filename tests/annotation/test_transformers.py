"""Local models as teachers: tiny models with random weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsbs import UserError, annotate, load_recipe
from dsbs.annotation.backends import RejectedError, Request
from dsbs.annotation.backends.transformers import TransformersTeacher

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "My",
    "invoice",
    "parcel",
    "number",
    "is",
    "wrong",
    "Answer",
    ":",
    "billing",
    "shipping",
    ".",
    *map(str, range(60)),
]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("causal")
    vocabulary = {
        word: i for i, word in enumerate(["<unk>", "<eos>", "<|user|>", "<|assistant|>", *WORDS])
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def teacher(toy: Callable[..., Path], model: Path, *overrides: str) -> TransformersTeacher:
    return TransformersTeacher(
        load_recipe(toy(), [f"teacher={{kind: transformers, model: '{model}'}}", *overrides])
    )


def complete(model: TransformersTeacher, bodies: list[dict[str, Any]]) -> list[Any]:
    async def main() -> list[Any]:
        work = (
            model.complete(Request({"max_tokens": 12, "temperature": 0.0} | body, 0))
            for body in bodies
        )
        replies = await asyncio.gather(*work, return_exceptions=True)
        await model.close()
        return replies

    return asyncio.run(main())


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def test_a_batch_of_different_lengths_is_answered_as_each_prompt_alone(
    toy: Callable[..., Path], causal: Path
) -> None:
    bodies = [
        user("My " * n + f"invoice number {n} is wrong.") for n in (1, 30, 3, 12, 25, 2, 8, 40, 5)
    ]
    together = complete(teacher(toy, causal, "teacher.batch_size=4"), bodies)
    alone = [complete(teacher(toy, causal, "teacher.batch_size=1"), [body])[0] for body in bodies]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert len({reply.text for reply in together}) > 3, "the model does look at its prompt"
    assert all(
        reply.completion_tokens <= 12 and reply.finish_reason in ("stop", "length")
        for reply in together
    )
    assert [reply.prompt_tokens for reply in together] == [reply.prompt_tokens for reply in alone]


def test_batches_have_similar_lengths(
    toy: Callable[..., Path], causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    model = teacher(toy, causal, "teacher.batch_size=3")
    real = model._generate

    def watched(requests: Any, texts: list[str]) -> Any:
        batches.append([len(text) for text in texts])
        return real(requests, texts)

    monkeypatch.setattr(model, "_generate", watched)
    complete(model, [user("My " * n) for n in (1, 40, 2, 41, 3, 42, 20, 21, 22)])
    assert [max(lengths) - min(lengths) <= 6 for lengths in batches] == [True] * 3


def test_running_out_of_memory_halves_the_batch(
    toy: Callable[..., Path], causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = teacher(toy, causal, "teacher.batch_size=8")
    real = model._generate

    def small_memory(requests: Any, texts: list[str]) -> Any:
        if len(texts) > 2:
            raise MemoryError
        return real(requests, texts)

    monkeypatch.setattr(model, "_generate", small_memory)
    assert all(
        reply.prompt_tokens for reply in complete(model, [user(f"My {n}") for n in range(9)])
    )
    monkeypatch.setattr(
        model, "_generate", lambda requests, texts: (_ for _ in ()).throw(MemoryError)
    )
    assert all(isinstance(reply, RejectedError) for reply in complete(model, [user("My")]))


def test_a_sequence_to_sequence_model_reads_the_whole_prompt(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    from test_student import make_student

    make_student().save(tmp_path / "t5")
    path = toy(train=6, test=4)
    recipe = load_recipe(
        path,
        [f"teacher={{kind: transformers, model: '{tmp_path / 't5'}'}}", "annotate.max_tokens=8"],
    )
    result = annotate(recipe, out=tmp_path / "run")
    assert result.splits["train"].requests == 6 and result.splits["train"].rejected["no-reply"] == 0
    again = annotate(recipe, out=tmp_path / "run")
    assert again.splits["train"].cached == 6 and again.splits["train"].requests == 0


def test_samples_differ_and_log_probabilities_belong_to_the_text(
    toy: Callable[..., Path], causal: Path
) -> None:
    model = teacher(toy, causal, "teacher.endpoint=completions", "teacher.extra_body={top_p: 0.9}")

    async def main() -> list[Any]:
        body = {
            "prompt": "My invoice",
            "max_tokens": 10,
            "temperature": 1.5,
            "top_p": 0.9,
            "logprobs": 1,
        }
        replies = [await model.complete(Request(body, sample)) for sample in (0, 1, 2, 0)]
        await model.close()
        return replies

    replies = asyncio.run(main())
    assert len({reply.text for reply in replies[:3]}) > 1 and replies[0].text == replies[3].text
    for reply in replies:
        tokens = json.loads(reply.raw)["choices"][0]["logprobs"]["content"]
        assert "".join(token["token"] for token in tokens) == reply.text and all(
            token["logprob"] <= 0 for token in tokens
        )


def test_log_probabilities_are_the_models_whatever_the_temperature(
    toy: Callable[..., Path], causal: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    body = {"prompt": "My invoice", "max_tokens": 3, "temperature": 0.2, "logprobs": 1}
    (reply,) = complete(teacher(toy, causal, "teacher.endpoint=completions"), [body])
    tokenizer, model = (
        AutoTokenizer.from_pretrained(causal),
        AutoModelForCausalLM.from_pretrained(causal),
    )
    first = json.loads(reply.raw)["choices"][0]["logprobs"]["content"][0]
    prompt = tokenizer("My invoice", return_tensors="pt")["input_ids"]
    expected = torch.log_softmax(model(prompt).logits[0, -1], dim=-1).tolist()
    assert min(abs(p - first["logprob"]) for p in expected) < 1e-4


def test_a_prompt_that_does_not_fit_is_refused_alone(
    toy: Callable[..., Path], causal: Path
) -> None:
    long, short = complete(teacher(toy, causal), [user("My " * 400), user("My invoice")])
    assert isinstance(long, RejectedError) and "context of 256" in str(long) and short.prompt_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["teacher.model=./nowhere"], "cannot be loaded"),
        (["teacher.extra_body={best_of: 3}"], "best_of"),
    ],
)
def test_a_model_that_cannot_work_is_an_error(
    toy: Callable[..., Path], causal: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        teacher(toy, causal, *changes)


def test_a_model_without_a_chat_template_must_use_completions(
    toy: Callable[..., Path], causal: Path, tmp_path: Path
) -> None:
    for file in causal.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps(
            {k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}
        )
    )
    with pytest.raises(UserError, match="no chat template"):
        teacher(toy, tmp_path)


def test_another_model_in_the_same_folder_is_another_teacher(
    toy: Callable[..., Path], causal: Path
) -> None:

    recipe = load_recipe(toy(), [f"teacher={{kind: transformers, model: '{causal}'}}"])
    before = TransformersTeacher.identities(recipe)
    (causal / "more.safetensors").write_bytes(b"")
    assert TransformersTeacher.identities(recipe) != before
    (causal / "more.safetensors").unlink()
    assert TransformersTeacher.identities(recipe) == before


def test_a_models_own_code_is_never_run_whatever_stdin_says(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.Own"}})
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="needs code from its repository, which dsbs never runs"):
        teacher(toy, folder)
    assert not (tmp_path / "ran").exists()
