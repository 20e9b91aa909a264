"""Label heads: a linear layer over a closed set of labels, on the states of a pretrained model.

The label is chosen in one pass instead of being written. The rationale is a second task for the
same states, which is dropped at inference: Dual-Head Reasoning Distillation (Xu et al., 2025,
arXiv:2509.21487) on the losses of Distilling Step-by-Step. An encoder-decoder writes rationales
with its own decoder, a decoder-only model with its own output layer, and an encoder with a small
decoder of its own that reads its states.

Shapes: B rows, S input tokens, T target tokens, D hidden size, L labels, V vocabulary entries.
This module imports torch, so it is imported where it is used.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from dsbs.config import StudentSection
from dsbs.errors import UserError
from dsbs.files import expand_user
from dsbs.students.card import Architecture, architecture_of, saved_classes
from dsbs.students.formats import SpecialTokens, start_token
from dsbs.students.weights import (
    RATIONALE_FOLDER,
    check_vocabulary,
    expand_local,
    load_model,
    loading_error,
    low_rank_class,
    new_model,
    pretrained_arguments,
    silence_transformers,
)

HEAD_FILE = "head.safetensors"
_INITIAL_DEVIATION = 0.02  # of new layers' weights, as BERT's (Devlin et al., 2019)
# The names that configurations of encoders have for rates inside the encoder.
_DROPOUT_RATES = (
    "hidden_dropout_prob", "attention_probs_dropout_prob",
    "dropout", "attention_dropout", "embedding_dropout", "mlp_dropout",
)  # fmt: skip


def mean_states(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over the tokens: states (B, S, D), attention_mask (B, S) -> (B, D)."""
    mask = attention_mask[..., None].to(states.dtype)
    mean: Tensor = (states * mask).sum(1) / mask.sum(1)
    return mean


class LabelHeadModel(nn.Module):
    """``body`` with a linear layer over ``labels`` labels and, for encoders, a rationale decoder.

    The states of an encoder (or of an encoder-decoder's encoder) are averaged over the input's
    tokens; those of a decoder-only model are its last token's.
    """

    def __init__(
        self,
        body: Any,
        labels: int,
        architecture: Architecture,
        rationale_decoder: Any = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.body = body
        self.architecture = architecture
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size(body.config), labels)
        self.rationale_decoder = rationale_decoder

    @property
    def config(self) -> Any:
        """The configuration of the pretrained model."""
        return self.body.config

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.parameters()).device
        return device

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (B, S), attention_mask (B, S) -> (B, S, D)."""
        states: Tensor = self._read(input_ids, attention_mask)[0]
        return states

    def layer_states(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """The states after each layer, the first one first: (B, S, D) each."""
        output = self._read(input_ids, attention_mask, output_hidden_states=True)
        return [*output.hidden_states[1:-1], output[0]]

    @property
    def reader(self) -> Any:
        """The part of the body that computes the states: a label needs no other part of it."""
        if self.architecture == "seq2seq":
            return self.body.get_encoder()
        if self.architecture == "causal":
            return self.body.get_decoder()
        return self.body

    def _read(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        segments = self.segments(input_ids)
        if segments is not None:
            options["token_type_ids"] = segments
        return self.reader(input_ids=input_ids, attention_mask=attention_mask, **options)

    def segments(self, input_ids: Tensor) -> Tensor | None:
        """input_ids (B, S) -> (B, S): 0 up to the first separator, then 1; None: not used."""
        if getattr(self.config, "type_vocab_size", 0) <= 1:
            return None
        is_separator = (input_ids == self.config.sep_token_id).long()
        segments: Tensor = (is_separator.cumsum(1) - is_separator).clamp(max=1)
        return segments

    def label_logits(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """states (B, S, D), attention_mask (B, S) -> (B, L)."""
        return self.classify(self.pool(states, attention_mask))

    def pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """states (B, S, D), attention_mask (B, S) -> (B, D)."""
        if self.architecture == "causal":
            last = attention_mask.sum(1) - 1
            return states[torch.arange(len(states), device=states.device), last]
        return mean_states(states, attention_mask)

    def classify(self, pooled: Tensor) -> Tensor:
        """pooled states (B, D) -> (B, L)."""
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits

    def rationale_logits(
        self, states: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """decoder_input_ids (B, T), after states (B, S, D) -> (B, T, V)."""
        if self.architecture == "encoder":
            output = self.rationale_decoder(
                input_ids=decoder_input_ids,
                encoder_hidden_states=states,
                encoder_attention_mask=attention_mask,
                use_cache=False,
            )
        else:
            output = self.body(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits

    @property
    def start(self) -> int:
        """The first token of a rationale."""
        if self.architecture == "encoder":
            return int(self.rationale_decoder.config.bos_token_id)
        return start_token(self.config, "pad")

    @torch.inference_mode()
    def write_rationales(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
    ) -> list[list[int]]:
        """An encoder's rationales by greedy decoding, each up to its end token, inclusive."""
        decoder = self.rationale_decoder
        end = int(decoder.config.eos_token_id)
        states = self.states(input_ids, attention_mask)
        token_ids = torch.full((len(states), 1), self.start, device=states.device)
        ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        cache = None
        limit = min(max_new_tokens, decoder.config.max_position_embeddings - 1)
        for _ in range(limit):
            output = decoder(
                input_ids=token_ids if cache is None else token_ids[:, -1:],
                encoder_hidden_states=states,
                encoder_attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            chosen = output.logits[:, -1].argmax(-1).masked_fill(ended, end)
            token_ids = torch.cat([token_ids, chosen[:, None]], dim=1)
            ended |= chosen == end
            if bool(ended.all()):
                break
        rows = []
        for row in token_ids[:, 1:].tolist():
            length = row.index(end) + 1 if end in row else len(row)
            rows.append(row[:length])
        return rows

    def with_body(self, body: Any) -> LabelHeadModel:
        """This head on another body, such as a smaller one."""
        changed = copy.copy(self)
        changed._modules = dict(self._modules)
        changed.body = body
        if self.rationale_decoder is not None:
            share_embeddings(self.rationale_decoder, body)
        return changed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (B, S), attention_mask (B, S) -> label logits (B, L)."""
        return self.label_logits(self.states(input_ids, attention_mask), attention_mask)

    def activation_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.body.activation_checkpointing_enable()
        if self.rationale_decoder is not None:
            self.rationale_decoder.activation_checkpointing_enable()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pretrained model in its own format, and the new layers beside it.

        Of a body with adapters, the adapters alone.
        """
        folder = Path(folder)
        self.body.save_pretrained(folder)
        weights = {name: value.contiguous() for name, value in self.classifier.state_dict().items()}
        save_file(weights, str(folder / HEAD_FILE))
        if self.rationale_decoder is not None:
            self.rationale_decoder.save_pretrained(folder / RATIONALE_FOLDER)

    def load_weights(self, folder: Path) -> None:
        """Read what ``save_pretrained`` wrote into this model, adapters included."""
        if hasattr(self.body, "peft_config"):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.body, load_peft_weights(str(folder), device="cpu"))
        else:
            self.body.load_state_dict(load_body(str(folder)).state_dict())
        self.load_new_layers(folder)

    def load_new_layers(self, folder: Path) -> None:
        """Read the label head and the rationale decoder in a folder."""
        self.classifier.load_state_dict(load_file(str(folder / HEAD_FILE)))
        if self.rationale_decoder is not None:
            from transformers import BertGenerationDecoder

            saved = BertGenerationDecoder.from_pretrained(folder / RATIONALE_FOLDER)
            self.rationale_decoder.load_state_dict(saved.state_dict())


def new_label_head(
    section: StudentSection,
    tokenizer: Any,
    labels: int,
    classes: tuple[str, ...],
    seed: int,
    init: str | None = None,
    *,
    explains: bool,
) -> LabelHeadModel:
    """The model that training starts from: pretrained weights, and new layers by ``seed`` alone.

    A head saved in ``init`` is kept where it has the same labels, in any order. ``explains``: an
    encoder gets a rationale decoder of ``student.rationale_decoder.layers``, unless ``init`` has
    one of that size.
    """
    start = init or section.source
    architecture = architecture_of(start)
    rate = 0.1 if section.dropout is None else section.dropout
    saved = saved_classes(init)
    if init is not None and saved is not None and sorted(saved) == sorted(classes):
        model = load_label_head(init, labels, section.dropout)
        _reorder(model.classifier, [saved.index(label) for label in classes])
        if explains and architecture == "encoder" and not _has_decoder_of(model, section):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                decoder = _new_rationale_decoder(model.body, section, tokenizer, rate)
                model.rationale_decoder = decoder
        return model
    if architecture == "encoder":
        body = load_body(str(start), section.dropout)
        check_vocabulary(body, tokenizer, str(start))
        body.config.sep_token_id = SpecialTokens.of(tokenizer).end
    else:
        body = new_model(section, tokenizer, seed, init)
    # The generator of new layers is not the training's: a student with a rationale decoder draws
    # the same dropout as one without.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LabelHeadModel(body, labels, architecture, dropout=rate)
        nn.init.normal_(model.classifier.weight, std=_INITIAL_DEVIATION)
        nn.init.zeros_(model.classifier.bias)
        if explains and architecture == "encoder":
            model.rationale_decoder = _new_rationale_decoder(body, section, tokenizer, rate)
    return model


def _has_decoder_of(model: LabelHeadModel, section: StudentSection) -> bool:
    """Whether a model has a rationale decoder of the recipe's layers and long enough targets."""
    if model.rationale_decoder is None:
        return False
    config = model.rationale_decoder.config
    return bool(
        config.num_hidden_layers == section.rationale_decoder.layers
        and config.max_position_embeddings > section.max_target_tokens
    )


def _reorder(classifier: nn.Linear, order: list[int]) -> None:
    """Give a head's outputs another order. Empty: its one output scores choices."""
    if order:
        with torch.no_grad():
            classifier.weight.copy_(classifier.weight[order].clone())
            classifier.bias.copy_(classifier.bias[order].clone())


def load_label_head(source: str, labels: int, dropout: float | None = None) -> LabelHeadModel:
    """The model in a student's folder. Raises DsbsError where it cannot be loaded."""
    folder = expand_user(source)
    body = load_body(source, dropout)
    rate = 0.1 if dropout is None else dropout
    model = LabelHeadModel(body, labels, architecture_of(source), dropout=rate)
    try:
        model.classifier.load_state_dict(load_file(str(folder / HEAD_FILE)))
        if (folder / RATIONALE_FOLDER).is_dir():
            from transformers import BertGenerationDecoder

            decoder = BertGenerationDecoder.from_pretrained(folder / RATIONALE_FOLDER)
            model.rationale_decoder = share_embeddings(decoder, body)
    except Exception as error:  # the errors of safetensors and transformers share no root
        raise loading_error("label head", source, error) from None
    return model


def load_body(source: str, dropout: float | None = None) -> Any:
    """The pretrained model below a head, in float32: an encoder alone, or the whole model."""
    if architecture_of(source) != "encoder":
        return load_model(source, dropout)
    from transformers import AutoModel

    silence_transformers()
    arguments = pretrained_arguments(source)
    try:
        changes: dict[str, Any] = {} if dropout is None else _dropout_rates(source, dropout)
        model_class = low_rank_class(expand_local(source), writes=False) or AutoModel
        return model_class.from_pretrained(**arguments, dtype=torch.float32, **changes)
    except UserError:
        raise
    except Exception as error:  # Hub, network and file errors share no root
        raise loading_error("model", source, error) from None


def _dropout_rates(source: str, rate: float) -> dict[str, float]:
    """The keys of an encoder's configuration that are dropout rates, all with ``rate``.

    Raises UserError where it has none.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(**pretrained_arguments(source))
    rates = {name: rate for name in _DROPOUT_RATES if hasattr(config, name)}
    if not rates:
        raise UserError(
            f"student.dropout: {source} has no dropout rate", hint="remove student.dropout"
        )
    return rates


def _new_rationale_decoder(
    body: Any, section: StudentSection, tokenizer: Any, dropout: float
) -> Any:
    """A decoder with cross-attention over an encoder's states, which shares its embeddings."""
    from transformers import BertGenerationConfig, BertGenerationDecoder

    special = SpecialTokens.of(tokenizer)
    size = hidden_size(body.config)
    heads = int(body.config.num_attention_heads)
    config = BertGenerationConfig(
        vocab_size=body.get_input_embeddings().num_embeddings,
        hidden_size=size,
        num_hidden_layers=section.rationale_decoder.layers,
        num_attention_heads=heads,
        intermediate_size=4 * size,
        max_position_embeddings=section.max_target_tokens + 1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        bos_token_id=special.start,
        eos_token_id=special.end,
        pad_token_id=special.pad,
        is_decoder=True,
        add_cross_attention=True,
        tie_word_embeddings=True,
    )
    return share_embeddings(BertGenerationDecoder(config), body)


def share_embeddings(decoder: Any, body: Any) -> Any:
    """Read and write with the encoder's token embeddings, where their width is the states'."""
    embeddings = body.get_input_embeddings()
    if embeddings.embedding_dim == hidden_size(body.config):
        decoder.set_input_embeddings(embeddings)
        decoder.tie_weights()
    return decoder


def hidden_size(config: Any) -> int:
    """The width of the states that a head reads: an encoder-decoder's encoder may be nested."""
    encoder = getattr(config, "encoder", None)
    nested = getattr(encoder, "text_config", None)
    for owner in (config, getattr(config, "text_config", None), nested, encoder):
        for name in ("hidden_size", "d_model", "n_embd"):
            size = getattr(owner, name, None)
            if size is not None:
                return int(size)
    raise AttributeError(f"{type(config).__name__} has no hidden size")
