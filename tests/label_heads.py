"""Tiny models of each family with a label head, and encoded rows of very different lengths."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import causal_models
import small_t5
import torch
import transformers as hf
from conftest import toy_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dsbs.students.heads import LabelHeadModel, hidden_size, share_embeddings
from dsbs.training.encode import Encoded

LABELS = 3
SEPARATOR = 3
ENCODERS = [
    "bert",
    "roberta",
    "xlm-roberta",
    "deberta-v2",
    "modernbert",
    "albert",
    "electra",
    "distilbert",
]
SEQ2SEQ = ["t5", "t5gemma", "t5gemma2"]
DECODERS = ["llama", "qwen3", "gpt2"]
FAMILIES = ENCODERS + SEQ2SEQ + DECODERS
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
GEMMA = SHAPE | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 64}


def rows(count: int = 8) -> list[Encoded]:
    """Rows of very different lengths; some have no rationale, one has two."""
    encoded: list[Encoded] = []
    for i in range(count):
        source = [5 + i, 9] * (1 + i) + [SEPARATOR] + [9, 5 + i] * i
        row: Encoded = {"label": [(source, [i % LABELS])]}
        if i not in (1, 4, 5):
            pair = (source, [10 + i] * (1 + 2 * i) + [4])
            row["rationale"] = [pair, (source, [7, 8, 4])] if i == 2 else [pair]
        encoded.append(row)
    return encoded


def choice_rows(count: int = 8) -> list[Encoded]:
    """Rows with two to four choices each; some have a rationale of another input."""
    encoded: list[Encoded] = []
    for i in range(count):
        question = [5 + i, 9] * (1 + i)
        pairs = [
            ([*question, SEPARATOR, 20 + choice], [int(choice == i % 2)])
            for choice in range(2 + i % 3)
        ]
        row: Encoded = {"label": pairs}
        if i not in (1, 4, 5):
            row["rationale"] = [([*question, 30, SEPARATOR], [10 + i] * (1 + 2 * i) + [4])]
        encoded.append(row)
    return encoded


def _encoder(family: str, dropout: float) -> Any:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if family == "modernbert":
        return hf.ModernBertModel(
            hf.ModernBertConfig(
                **SHAPE,
                pad_token_id=0,
                global_attn_every_n_layers=2,
                local_attention=8,
                embedding_dropout=dropout,
                mlp_dropout=dropout,
                attention_dropout=dropout,
            )
        )
    if family == "distilbert":
        return hf.DistilBertModel(
            hf.DistilBertConfig(
                vocab_size=SHAPE["vocab_size"],
                dim=SHAPE["hidden_size"],
                hidden_dim=SHAPE["intermediate_size"],
                n_layers=2,
                n_heads=2,
                dropout=dropout,
                attention_dropout=dropout,
            )
        )
    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "bert": (hf.BertModel, hf.BertConfig, {}),
        "roberta": (hf.RobertaModel, hf.RobertaConfig, {"type_vocab_size": 1}),
        "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig, {"type_vocab_size": 1}),
        "albert": (hf.AlbertModel, hf.AlbertConfig, {"embedding_size": 8}),
        "electra": (hf.ElectraModel, hf.ElectraConfig, {"embedding_size": 8}),
        "deberta-v2": (  # as DeBERTa-v3 has it
            hf.DebertaV2Model,
            hf.DebertaV2Config,
            {
                "relative_attention": True,
                "position_buckets": 8,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_biased_input": False,
                "type_vocab_size": 0,
            },
        ),
    }
    model_class, config_class, settings = classes[family]
    return model_class(config_class(**SHAPE, **rates, **settings))


def seq2seq_model(family: str, dropout: float = 0.0, **settings: int) -> Any:
    """A T5Gemma or a T5; ``settings`` are its vocabulary and special tokens."""
    if family == "t5":
        return small_t5.t5(dropout_rate=dropout).float()
    torch.manual_seed(1)
    gemma = GEMMA | settings
    common: dict[str, Any] = {"dropout_rate": dropout, "attn_implementation": "eager"}
    if family == "t5gemma":
        vocabulary = gemma["vocab_size"]
        config: Any = hf.T5GemmaConfig(
            encoder=gemma, decoder=gemma, vocab_size=vocabulary, **common
        )
        return hf.T5GemmaForConditionalGeneration(config)
    vision = SHAPE | {"image_size": 8, "patch_size": 4}
    del vision["vocab_size"]
    config = hf.T5Gemma2Config(
        encoder={"text_config": gemma, "vision_config": vision, "mm_tokens_per_image": 1},
        decoder=gemma,
        image_token_index=gemma["vocab_size"] - 1,
        **common,
    )
    return hf.T5Gemma2ForConditionalGeneration(config)


def label_head(family: str, dropout: float = 0.0, outputs: int = LABELS) -> LabelHeadModel:
    """A model with random weights, and for encoders a rationale decoder."""
    torch.manual_seed(1)
    if family in DECODERS:
        body = causal_models.model(family, 50)
        return LabelHeadModel(body, outputs, "causal", dropout=dropout)
    if family in SEQ2SEQ:
        return LabelHeadModel(seq2seq_model(family, dropout), outputs, "seq2seq", dropout=dropout)
    body = _encoder(family, dropout)
    body.config.sep_token_id = SEPARATOR
    config = hf.BertGenerationConfig(
        **SHAPE,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        bos_token_id=2,
        eos_token_id=4,
        is_decoder=True,
        add_cross_attention=True,
    )
    decoder = share_embeddings(hf.BertGenerationDecoder(config), body)
    assert hidden_size(body.config) == SHAPE["hidden_size"]
    return LabelHeadModel(body, outputs, "encoder", decoder, dropout=dropout)


def save_encoder(folder: Path, layers: int = 2, words: Sequence[str] = ()) -> str:
    """A tiny encoder with a WordPiece tokenizer of the toy task, for ``student.model``.

    ``words`` are further words of its vocabulary.
    """
    toy_words = sorted({word for row in toy_rows(40) for word in re.findall(r"\w+", row["text"])})
    texts = ["The message is about an invoice a parcel", *toy_words, *words]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *string.ascii_lowercase, *string.digits]
    vocabulary += [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    vocabulary += [word for text in texts for word in text.lower().split()]
    ids = {word: index for index, word in enumerate(dict.fromkeys(vocabulary))}
    pieces = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    shape = SHAPE | {"vocab_size": len(ids), "num_hidden_layers": layers}
    hf.BertModel(hf.BertConfig(**shape, max_position_embeddings=40)).save_pretrained(folder)
    return str(folder)
