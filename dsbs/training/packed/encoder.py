"""Encoders and their rationale decoder on packed batches: layers see real tokens only.

Embeddings, linear layers, norms and dropout of transformers' own modules run on all tokens of a
batch as one row with the positions of each token in its own sequence. An attention function,
registered with transformers, separates the sequences and pads them to groups of similar length.

Shapes: N tokens of all inputs, M tokens of all targets, D hidden size, V vocabulary entries,
H heads, K width of a head; groups of B rows by S slots (see ``layout``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsbs.students.heads import LabelHeadModel
from dsbs.training.losses import IGNORED
from dsbs.training.packed.layout import (
    GroupLayout,
    additive_mask,
    attend,
    decoder_layouts,
    distinct_blocks,
    dropout,
    layout_by_length,
    row_starts,
)
from dsbs.training.packed.t5 import without_wrapper

ATTENTION = "dsbs_packed"
# Models whose layers see each token alone, but for attention by transformers' interface.
FAMILIES = frozenset(
    ["albert", "bert", "camembert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta"]
)


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of one packed row, and what they attend to."""

    queries: GroupLayout
    memory: Sequence[GroupLayout] = ()
    """For cross-attention: the sequences that the groups of ``queries`` read, in their order."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, N, K), key and value of as many or of the memory's tokens -> (1, N, H, K).

    A causal module attends within its sequences, another to the memory if there is one. Without
    ``sequences`` it is transformers' own attention for padded batches.
    """
    if sequences is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    layout = sequences.queries
    is_causal = bool(module.is_causal)
    key_layouts = sequences.memory if sequences.memory and not is_causal else [layout]
    heads, width = query.shape[1], query.shape[3]

    def split(x: Tensor, layouts: Sequence[GroupLayout]) -> list[Tensor]:
        """By group, (B, H, S, K)."""
        tokens = x.transpose(1, 2).reshape(-1, heads * width)
        groups = [group for layout in layouts for group in layout.pad(tokens)]
        return [group.unflatten(2, (heads, width)).transpose(1, 2) for group in groups]

    real = [group.real for key_layout in key_layouts for group in key_layout.groups]
    outputs: list[Tensor] = []
    for q, k, v, group_real in zip(
        split(query, [layout]),
        split(key, key_layouts),
        split(value, key_layouts),
        real,
        strict=True,
    ):
        mask = _attention_mask(group_real, q.dtype, is_causal=is_causal, window=sliding_window)
        if dropout == 0 or q.is_cuda:
            attended = functional.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, scale=scaling
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        else:
            outputs.append(attend(q * scaling, k, v, mask, dropout, training=True))
    return layout.unpad(outputs).view(1, -1, heads, width), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention_mask(
    real: Tensor, dtype: torch.dtype, *, is_causal: bool, window: int | None
) -> Tensor:
    """real (B, S) -> (B or 1, 1, S or 1, S): 0 where to attend, the lowest number elsewhere.

    ``window``: tokens attend to those nearer than that. In a causal row padding comes last, where
    no real token attends.
    """
    size = real.shape[1]
    allowed = real[:, None, None]
    if is_causal:
        allowed = torch.ones(size, size, dtype=torch.bool, device=real.device).tril()[None, None]
    if window is not None and window < size:
        slots = torch.arange(size, device=real.device)
        allowed = allowed & ((slots[:, None] - slots).abs() < window)
    return additive_mask(allowed, dtype)


class _Dropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


def pack_encoder(model: LabelHeadModel) -> bool:
    """Prepare a model for packed batches; False where its family's attention does not allow it.

    Its dropout becomes the one that costs less on a CPU.
    """
    body = without_wrapper(model.body)
    if model.architecture != "encoder" or body.config.model_type not in FAMILIES:
        return False
    for stack in (body, model.rationale_decoder):
        if stack is not None:
            stack.config._attn_implementation = ATTENTION
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Dropout:
                setattr(module, name, _Dropout(layer.p).train(layer.training))
    return True


@dataclass(frozen=True, slots=True)
class Rationales:
    """Target rows, each after an input."""

    ids: Sequence[Tensor]
    inputs: Sequence[int]
    """The index of each one's input; several may share an input."""


def encode_and_write(
    model: LabelHeadModel,
    inputs: Sequence[Tensor],
    rationales: Rationales | None,
    *,
    hidden_states: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """The states (N, D) after the last layer, or after each; and the rationales' cross-entropy ().

    It is summed, in nats; None without rationales.
    """
    source = torch.cat(list(inputs))
    lengths = [len(ids) for ids in inputs]
    embeddings = without_wrapper(model.body).get_input_embeddings()
    if rationales is None:
        return _encode(model, inputs, embeddings(source), lengths, hidden_states), None
    target = torch.cat(list(rationales.ids))
    target_lengths = [len(ids) for ids in rationales.ids]
    written = target.roll(1).clamp(min=0)
    written[row_starts(target_lengths)] = model.start
    decoder = model.rationale_decoder
    if decoder.get_input_embeddings() is embeddings:
        # looked up at once: each lookup has a gradient of the size of the vocabulary
        embedded, target_embedded = torch.split(
            embeddings(torch.cat([source, written])), [len(source), len(written)]
        )
    else:
        embedded, target_embedded = embeddings(source), decoder.get_input_embeddings()(written)
    states = _encode(model, inputs, embedded, lengths, hidden_states)
    blocks = distinct_blocks(rationales.inputs)
    layout, memory = decoder_layouts(
        lengths, target_lengths, rationales.inputs, blocks, source.device
    )
    positions = torch.cat([torch.arange(n, device=source.device) for n in target_lengths])
    hidden = decoder.bert(
        inputs_embeds=target_embedded[None],
        attention_mask=_no_mask(source.device),
        position_ids=positions[None],
        encoder_hidden_states=states[-1][None],
        use_cache=False,
        sequences=Sequences(layout, memory),
    )[0][0]
    head = decoder.get_output_embeddings()
    loss: Tensor = _LinearNll.apply(hidden, head.weight, head.bias, target)
    return states, loss


class _LinearNll(torch.autograd.Function):
    """The summed cross-entropy () of a linear layer's outputs (M, V).

    Logits, log-probabilities and their gradient share one tensor; cross_entropy would make four.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        logits = functional.linear(hidden, weight, bias)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        torch.log_softmax(wide, -1, out=wide)
        rows = (target != IGNORED).nonzero().squeeze(1)
        loss = -wide[rows, target[rows]].sum()
        wide.exp_()
        wide[rows, target[rows]] -= 1
        if len(rows) < len(target):
            wide[target == IGNORED] = 0
        ctx.save_for_backward(hidden, weight, wide.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        hidden, weight, difference = ctx.saved_tensors
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        scaled = (hidden * grad).to(difference.dtype)
        grad_hidden = (difference @ weight.to(difference.dtype)) * grad
        grad_weight = (difference.t() @ scaled).to(weight.dtype) if needs_weight else None
        grad_bias = (difference.sum(0) * grad).to(weight.dtype) if needs_bias else None
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None


def _encode(
    model: LabelHeadModel,
    inputs: Sequence[Tensor],
    embedded: Tensor,
    lengths: Sequence[int],
    hidden_states: bool,
) -> list[Tensor]:
    """inputs with their embeddings (N, D) -> states (N, D) after the last layer, or after each."""
    body = without_wrapper(model.body)
    pad_id = body.config.pad_token_id or 0
    padded = pad_sequence(list(inputs), batch_first=True, padding_value=pad_id)
    row_lengths = torch.tensor(lengths, device=padded.device)
    real = torch.arange(padded.shape[1], device=padded.device) < row_lengths[:, None]
    options: dict[str, Any] = {}
    segments = model.segments(padded)
    if segments is not None:
        options["token_type_ids"] = segments[real][None]
    if hidden_states:
        options["output_hidden_states"] = True
    output = model.body(
        inputs_embeds=embedded[None],
        attention_mask=_no_mask(padded.device),
        position_ids=_positions(body, padded)[real][None],
        sequences=Sequences(layout_by_length(lengths, padded.device)),
        **options,
    )
    layers = output.hidden_states[1:-1] if hidden_states else ()
    return [layer[0] for layer in (*layers, output[0])]


def _positions(body: Any, padded: Tensor) -> Tensor:
    """padded ids (B, S) -> (B, S): the position that a model's embeddings give to each token."""
    embeddings: Any = getattr(body, "embeddings", None)
    if hasattr(
        embeddings, "create_position_ids_from_input_ids"
    ):  # RoBERTa's start after its pad id
        positions: Tensor = embeddings.create_position_ids_from_input_ids(
            padded, embeddings.padding_idx
        )
        return positions
    return torch.arange(padded.shape[1], device=padded.device).expand_as(padded)


def _no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions, which transformers hands on instead of making its own."""
    return torch.ones(1, 1, 1, 1, device=device)
