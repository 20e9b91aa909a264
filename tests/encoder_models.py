"""Tiny encoders with a label head and sharp random weights, for each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TEAMS, toy_rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dsbs.config import TaskSection
from dsbs.students.card import StudentCard
from dsbs.students.heads import LabelHeadModel
from dsbs.students.student import Student
from dsbs.students.tokenizer import learn_vocabulary

FAMILIES = ["bert", "roberta", "distilbert", "deberta-v2", "modernbert"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
TASK = TaskSection.model_validate(
    {
        "name": "classification",
        "labels": list(TEAMS),
        "columns": {"label": "team"},
        "data": {"train": "none.csv"},
    }
)


def word_tokenizer(more: str = "") -> Any:
    """Whole words of the toy rows and of ``more``, with separators around a text or a pair."""
    texts = [*(row["text"] for row in toy_rows(80)), more]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


def encoder(family: str, vocabulary: int, **changes: Any) -> Any:
    torch.manual_seed(2)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "sep_token_id": 2,
    }
    shape |= changes
    if family == "bert":
        return BertModel(BertConfig(**shape))
    if family == "roberta":
        return RobertaModel(RobertaConfig(**shape | {"type_vocab_size": 1}))
    if family == "deberta-v2":
        relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
        return DebertaV2Model(DebertaV2Config(**shape, **relative, type_vocab_size=0))
    if family == "modernbert":
        special = {"cls_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
        return ModernBertModel(ModernBertConfig(**shape, **special, local_attention=8))
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers"}
    names |= {"num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"}
    renamed = {names.get(key, key): value for key, value in shape.items()}
    return DistilBertModel(DistilBertConfig(**renamed))


def sharpen(model: Any) -> None:
    """Weights so large that no rounding changes a label."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.4)


def label_head_student(family: str = "bert", prefix: str = "", **changes: Any) -> Student:
    """A student of ``encoder`` or, for "t5", with T5's encoder."""
    is_t5 = family == "t5"
    if is_t5:
        tokenizer = learn_vocabulary((row["text"] for row in toy_rows(80)), 120)
        shape = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 2}
        torch.manual_seed(2)
        config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **shape)
        body: Any = T5ForConditionalGeneration(config)
    else:
        tokenizer = word_tokenizer()
        body = encoder(family, len(tokenizer), **changes)
    model = LabelHeadModel(body, len(TEAMS), "seq2seq" if is_t5 else "encoder")
    sharpen(model)
    card = StudentCard(
        name="tiny",
        method="finetune",
        labels="gold",
        seed=0,
        task=TASK,
        prefixes={"label": prefix},
        max_input_tokens=24,
        max_target_tokens=12,
        kind=model.architecture,
        head="labels",
        classes=TEAMS,
    )
    return Student.of(model, tokenizer, card)


def save_label_head(folder: Path, family: str = "bert", **changes: Any) -> Path:
    label_head_student(family, **changes).save(folder / "student")
    return folder / "student"


def texts(count: int) -> list[str]:
    """Inputs of many lengths; every third is a pair."""
    rows = [row["text"] for row in toy_rows(count + 3)]
    joined = [" ".join(rows[i : i + 1 + i % 3]) for i in range(count)]
    return [text if i % 3 else f"{text}</s>{rows[i + 1]}" for i, text in enumerate(joined)]
