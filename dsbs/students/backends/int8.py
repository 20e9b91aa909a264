"""Students in torch alone: as they were trained, or in dynamic int8, whose activations are quantised as they come."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError
from dsbs.files import full_disk_as_partial
from dsbs.students.backends.decoder import Causal
from dsbs.students.backends.seq2seq import Seq2Seq
from dsbs.students.backends.torch_base import TorchEngine
from dsbs.students.card import StudentCard
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import quiet

WEIGHTS = "model-int8.pt"


class _Dynamic(TorchEngine):
    """On the CPU: torch has these products for no other device. Of a folder that is not quantised, ``plain``'s engine."""

    plain: type[TorchEngine]

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> TorchEngine:
        if not (path / WEIGHTS).is_file():
            return cls.plain.load(path, card)
        return cls(_read(path), load_tokenizer(str(path)), card)

    def save(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_quantized(self.model, folder)

    @property
    def parameters(self) -> int:
        return _count(self.model)


class TorchStudent(_Dynamic, Seq2Seq):
    plain = Seq2Seq


class TorchCausal(_Dynamic, Causal):
    plain = Causal


def _read(path: Path) -> Any:
    """The quantised model of a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from dsbs.students.low_rank import ranks_of, replace

    quiet()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        plain = kind.from_config(config)
        replace(plain, ranks_of(str(path)))
        model = quantized(plain)
        with _silent(), _untied(model):
            model.load_state_dict(torch.load(path / WEIGHTS, weights_only=True))
    except Exception as error:  # those of torch and transformers share no root
        raise DsbsError(
            f"the export in {path} cannot be loaded ({error})", hint="export the student again"
        ) from None
    return model


def _count(model: Any) -> int:
    from dsbs.students.low_rank import LowRank

    found = 0
    for module in model.modules():  # each once
        if isinstance(module, LowRank):  # its two matrices are counted themselves
            continue
        for name in ("weight", "bias"):
            number = getattr(module, name, None)
            number = number() if callable(number) else number  # a quantised module's is a method
            found += 0 if number is None else number.numel()
    return found


def quantized(model: Any) -> Any:
    """A copy on the CPU whose matrices are int8 by rows of their own scale, and its embeddings as well."""
    import torch
    from torch.ao.quantization import (
        float_qparams_weight_only_qconfig,
        per_channel_dynamic_qconfig,
        quantize_dynamic,
    )

    kinds = {
        torch.nn.Linear: per_channel_dynamic_qconfig,
        embeddings(model): float_qparams_weight_only_qconfig,
    }
    with _silent():
        made: Any = quantize_dynamic(
            deepcopy(model).to("cpu").eval(), kinds, dtype=torch.qint8, inplace=True
        )
    _tie(made)
    return made


def embeddings(model: Any) -> str:
    """The name of a model's input embeddings: a T5's are ``shared``."""
    wanted = model.get_input_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _tie(model: Any) -> None:
    """Both stacks of a T5 have its embeddings."""
    if hasattr(model, "shared"):
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared


@contextmanager
def _untied(model: Any) -> Iterator[None]:
    """While weights are saved and loaded: both stacks' embeddings are the model's own."""
    if hasattr(model, "shared"):
        model.encoder.embed_tokens = model.decoder.embed_tokens = None
    yield
    _tie(model)


def save_quantized(model: Any, folder: Path) -> None:
    import torch

    with (
        _silent(),
        _untied(model),
        full_disk_as_partial(folder, hint="free some space, then run the same command"),
    ):
        torch.save(model.state_dict(), folder / WEIGHTS)


@contextmanager
def _silent() -> Iterator[None]:
    """torch says at each step of its quantisation that another package takes its place, which is slower on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
