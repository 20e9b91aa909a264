"""A T5 in torch alone: as it was trained, or in dynamic int8, whose activations are quantised as they come."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from dsbs.artefacts import room
from dsbs.errors import DsbsError
from dsbs.student.card import StudentCard
from dsbs.student.seq2seq import Seq2Seq
from dsbs.student.tokenizer import load_tokenizer
from dsbs.student.weights import quiet

WEIGHTS = "model-int8.pt"


class TorchStudent(Seq2Seq):
    """On the CPU where it is quantised: torch has these products for no other device."""

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> Seq2Seq:
        file = path / WEIGHTS
        if not file.is_file():
            return Seq2Seq.load(path, card)
        import torch
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        from dsbs.student.low_rank import ranks_of, replace

        quiet()
        try:
            plain = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
            replace(plain, ranks_of(str(path)))
            model = quantized(plain)
            with _silent():
                _tie(model, None)
                model.load_state_dict(torch.load(file, weights_only=True))
                _tie(model, model.shared)
        except Exception as error:  # those of torch and transformers share no root
            raise DsbsError(f"the export in {path} cannot be loaded ({error})", hint="export the student again") from None
        return cls(model, load_tokenizer(str(path)), card)

    def save(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_quantized(self.model, folder)

    @property
    def parameters(self) -> int:
        from dsbs.student.low_rank import LowRank

        found = 0
        for module in self.model.modules():  # each once
            if isinstance(module, LowRank):  # its two matrices are counted themselves
                continue
            weight = getattr(module, "weight", None)
            weight = weight() if callable(weight) else weight  # a quantised module's is a method
            found += 0 if weight is None else weight.numel()
        return found


def quantized(model: Any) -> Any:
    """A copy on the CPU whose matrices are int8 by rows of their own scale, and its embeddings as well."""
    import torch
    from torch.ao.quantization import float_qparams_weight_only_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

    kinds = {torch.nn.Linear: per_channel_dynamic_qconfig, "shared": float_qparams_weight_only_qconfig}
    with _silent():
        made: Any = quantize_dynamic(deepcopy(model).to("cpu").eval(), kinds, dtype=torch.qint8, inplace=True)
    _tie(made, made.shared)
    return made


def _tie(model: Any, embeddings: Any) -> None:
    """Give both stacks these embeddings; none while weights are saved and loaded, since the model's own are the same."""
    model.encoder.embed_tokens = model.decoder.embed_tokens = embeddings


def save_quantized(model: Any, folder: Path) -> None:
    import torch

    with _silent(), room(folder, hint="free some space, then run the same command"):
        _tie(model, None)
        torch.save(model.state_dict(), folder / WEIGHTS)
        _tie(model, model.shared)


@contextmanager
def _silent() -> Iterator[None]:
    """torch says at each step of its quantisation that another package takes its place, which is slower on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
