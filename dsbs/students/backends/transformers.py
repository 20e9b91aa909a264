"""Transformers backends: T5 and decoder-only students in PyTorch, in float32 or dynamic int8."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from dsbs.files import full_disk_as_partial
from dsbs.students.backends import GeneratedText, export_error
from dsbs.students.backends.scoring import (
    GreedyLogProbabilities,
    joint_log_probability,
    padded,
    score_blocks,
)
from dsbs.students.card import Start, StudentCard
from dsbs.students.formats import ChatFormat, end_tokens, input_format_of, start_token
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import device, load_model, silence_transformers

INT8_WEIGHTS = "model-int8.pt"


class TransformersBackend:
    """What T5 and decoder-only backends share. Inputs over ``max_input_tokens`` are truncated."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._max_input_tokens = card.max_input_tokens

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> TransformersBackend:
        model = load_model(str(path)).to(device())
        return cls(model, load_tokenizer(str(path)), card)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class EncoderDecoderBackend(TransformersBackend):
    """A T5. See ``Backend`` and ``BeamSearchBackend``."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        from transformers import GenerationConfig

        super().__init__(model, tokenizer, card)
        # The model's own may set a least length or forbid repetitions, which exports do not.
        special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        model.generation_config = GenerationConfig(
            **{name: getattr(model.generation_config, name) for name in special}
        )

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``. Probabilities add about a hundredth of the decoding time."""
        import torch

        self.model.eval()
        batch = self._encode(texts)
        recorder = GreedyLogProbabilities()
        with torch.inference_mode():
            token_ids = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                decoder_start_token_id=start_token(self.model.config, start),
                num_beams=1,
                do_sample=False,
                logits_processor=[recorder] if probabilities else None,
            )
            written_ids = token_ids[:, 1:]  # (B, T), without the start token
            is_end = self._is_end(written_ids).long()
            is_output = is_end.cumsum(1) - is_end == 0
        decoded = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        generated = _generated(decoded, is_end.any(1).tolist())
        return recorder.add_to(generated, written_ids, is_output) if probabilities else generated

    def beam_search(
        self, texts: Sequence[str], max_new_tokens: int, start: Start, beams: int
    ) -> list[GeneratedText]:
        """See ``BeamSearchBackend``."""
        import torch

        self.model.eval()
        batch = self._encode(texts)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                decoder_start_token_id=start_token(self.model.config, start),
                num_beams=beams,
                do_sample=False,
                length_penalty=0.0,  # otherwise the score is a mean over the tokens
                output_scores=True,
                return_dict_in_generate=True,
            )
        token_ids = output.sequences
        has_end = self._is_end(token_ids[:, 1:]).any(1).tolist()
        row_probabilities = output.sequences_scores.cpu().double().clamp(max=0.0).exp().tolist()
        decoded = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [
            output._replace(probability=probability)
            for output, probability in zip(
                _generated(decoded, has_end), row_probabilities, strict=True
            )
        ]

    def score(self, texts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """See ``ScoringBackend``. The inputs are encoded once, and decoded for every answer."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        self.model.eval()
        batch = self._encode(texts)
        answer_ids = padded(
            input_format_of(self.tokenizer, "seq2seq").write(answers), self.model.device
        )
        start = start_token(self.model.config, "pad")
        with torch.inference_mode():
            states = self.model.get_encoder()(**batch).last_hidden_state  # (B, S, d)

            def log_probabilities(rows: slice, ids: Any, is_token: Any) -> Any:
                count = len(ids) // len(states[rows])
                mask = batch["attention_mask"][rows].repeat_interleave(count, 0)
                hidden = states[rows].repeat_interleave(count, 0)
                logits = self.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                    attention_mask=mask,
                    decoder_input_ids=torch.nn.functional.pad(ids[:, :-1], (1, 0), value=start),
                ).logits
                return joint_log_probability(logits, ids, is_token)

            return score_blocks(len(texts), answer_ids, log_probabilities)

    def pooled_states(self, texts: Sequence[str]) -> Any:
        """See ``StatesBackend``."""
        import torch

        from dsbs.students.heads import mean_states

        self.model.eval()
        batch = self._encode(texts)
        with torch.inference_mode():
            states = self.model.get_encoder()(**batch).last_hidden_state
            return mean_states(states, batch["attention_mask"])

    def _is_end(self, token_ids: Any) -> Any:
        import torch

        ends = torch.tensor(end_tokens(self.model.config), device=token_ids.device)
        return torch.isin(token_ids, ends)

    def _encode(self, texts: Sequence[str]) -> Any:
        """input_ids and attention_mask, (B, T) each."""
        return self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._max_input_tokens,
            return_tensors="pt",
        ).to(self.model.device)


class DecoderBackend(TransformersBackend):
    """A decoder-only student such as Llama, Qwen or SmolLM.

    Prompts over ``max_input_tokens`` are truncated in their text; the template stays complete.
    """

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        from transformers import GenerationConfig

        super().__init__(model, tokenizer, card)
        self.input_format = ChatFormat(tokenizer, card.template or "plain")
        model.config.pad_token_id = tokenizer.pad_token_id
        # The model's own configuration may set a temperature or a repetition penalty.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.input_format.stops,
            pad_token_id=tokenizer.pad_token_id,
        )

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        _start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``."""
        import torch

        self.model.eval()
        input_ids, mask = self._pad_left(self.input_format.read(texts, self._max_input_tokens))
        recorder = GreedyLogProbabilities()
        with torch.inference_mode():
            token_ids = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                generation_config=self.model.generation_config,
                num_beams=1,
                do_sample=False,
                logits_processor=[recorder] if probabilities else None,
            )[:, input_ids.shape[1] :]
            stops = torch.tensor(self.input_format.stops, device=token_ids.device)
            is_end = torch.isin(token_ids, stops).long()  # (B, T)
            is_output = is_end.cumsum(1) - is_end == 0  # up to the first end token, inclusive
        answers = [
            row[keep] for row, keep in zip(token_ids, is_output & (is_end == 0), strict=True)
        ]
        decoded = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        generated = _generated(decoded, is_end.any(1).tolist())
        return recorder.add_to(generated, token_ids, is_output) if probabilities else generated

    def score(self, texts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """See ``ScoringBackend``.

        A prompt is read once, and its cache serves every answer, where all layers are attention.
        Other layers, such as Mamba's, read it again with each answer.
        """
        import torch

        self.model.eval()
        prompts = self.input_format.read(texts, self._max_input_tokens)
        answer_ids = padded(self.input_format.write(answers), self.model.device)
        with torch.inference_mode():

            def log_probabilities(rows: slice, ids: Any, is_token: Any) -> Any:
                input_ids, mask = self._pad_left(prompts[rows])
                prompt = self.model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    use_cache=True,
                    logits_to_keep=1,
                )
                count = len(ids) // len(input_ids)
                read_ids = ids[:, :-1]
                whole_mask = torch.cat(
                    [mask.repeat_interleave(count, 0), torch.ones_like(read_ids)], 1
                )
                positions = (whole_mask.cumsum(1) - 1).clamp(min=0)
                cache: Any = getattr(prompt, "past_key_values", None)
                if not _is_of_attention(cache):
                    whole_ids = torch.cat([input_ids.repeat_interleave(count, 0), read_ids], 1)
                    logits = self.model(
                        input_ids=whole_ids,
                        attention_mask=whole_mask,
                        position_ids=positions,
                        use_cache=False,
                        logits_to_keep=ids.shape[1],
                    ).logits
                    return joint_log_probability(logits, ids, is_token)
                cache.batch_repeat_interleave(count)
                later = self.model(
                    input_ids=read_ids,
                    attention_mask=whole_mask,
                    position_ids=positions[:, input_ids.shape[1] :],
                    past_key_values=cache,
                ).logits
                first = prompt.logits[:, -1:].repeat_interleave(count, 0)  # (n, 1, V)
                return joint_log_probability(torch.cat([first, later], 1), ids, is_token)

            return score_blocks(len(texts), answer_ids, log_probabilities)

    def pooled_states(self, texts: Sequence[str]) -> Any:
        """See ``StatesBackend``."""
        import torch

        from dsbs.students.heads import mean_states

        self.model.eval()
        input_ids, mask = self._pad_left(self.input_format.read(texts, self._max_input_tokens))
        with torch.inference_mode():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
            return mean_states(self.model.base_model(**inputs).last_hidden_state, mask)

    def _pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Prompts and their mask, (B, T) each, so that all answers begin at the same position.

        Padding is masked, and positions count from the first real token.
        """
        import torch

        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return input_ids.to(self.model.device), mask.to(self.model.device)


def _is_of_attention(cache: Any) -> bool:
    """Whether a cache holds the keys and values of attention alone, so that it can be repeated."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in kinds for layer in layers)


def _generated(texts: Sequence[str], has_end: Sequence[bool]) -> list[GeneratedText]:
    return [
        GeneratedText(text.strip(), not ended, None)
        for text, ended in zip(texts, has_end, strict=True)
    ]


# --- dynamic int8: activations are quantized as they come


class _Int8Backend(TransformersBackend):
    """Runs on the CPU, the only device with these matrix products in PyTorch.

    A folder without int8 weights is loaded by ``float_backend``.
    """

    float_backend: type[TransformersBackend]

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> TransformersBackend:
        if not (path / INT8_WEIGHTS).is_file():
            return cls.float_backend.load(path, card)
        return cls(_load_int8(path), load_tokenizer(str(path)), card)

    def save(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_int8(self.model, folder)

    @property
    def parameters(self) -> int:
        return _count_parameters(self.model)


class Int8EncoderDecoderBackend(_Int8Backend, EncoderDecoderBackend):
    float_backend = EncoderDecoderBackend


class Int8DecoderBackend(_Int8Backend, DecoderBackend):
    float_backend = DecoderBackend


def _load_int8(path: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from dsbs.students.low_rank import ranks_of, replace

    silence_transformers()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model_class: Any = AutoModelForCausalLM
        if config.is_encoder_decoder:
            model_class = AutoModelForSeq2SeqLM
        float_model = model_class.from_config(config)
        replace(float_model, ranks_of(str(path)))
        model = quantize_int8(float_model)
        with _ignore_warnings(), _untied(model):
            model.load_state_dict(torch.load(path / INT8_WEIGHTS, weights_only=True))
    except Exception as error:  # the errors of torch and transformers share no root
        raise export_error(path, error) from None
    return model


def _count_parameters(model: Any) -> int:
    from dsbs.students.low_rank import LowRank

    total = 0
    for module in model.modules():
        if isinstance(module, LowRank):  # its two matrices are modules of their own
            continue
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if callable(parameter):  # a method of a quantized module
                parameter = parameter()
            if parameter is not None:
                total += parameter.numel()
    return total


def quantize_int8(model: Any) -> Any:
    """A copy on the CPU with int8 matrices and embeddings, scaled by row."""
    import torch
    from torch.ao.quantization import (
        float_qparams_weight_only_qconfig,
        per_channel_dynamic_qconfig,
        quantize_dynamic,
    )

    configurations = {
        torch.nn.Linear: per_channel_dynamic_qconfig,
        embeddings_name(model): float_qparams_weight_only_qconfig,
    }
    with _ignore_warnings():
        quantized: Any = quantize_dynamic(
            deepcopy(model).to("cpu").eval(), configurations, dtype=torch.qint8, inplace=True
        )
    _tie(quantized)
    return quantized


def embeddings_name(model: Any) -> str:
    """The name of a model's input embeddings: ``shared`` in a T5."""
    embeddings = model.get_input_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is embeddings)


def save_int8(model: Any, folder: Path) -> None:
    import torch

    with (
        _ignore_warnings(),
        _untied(model),
        full_disk_as_partial(folder, hint="free some space, then run the same command"),
    ):
        torch.save(model.state_dict(), folder / INT8_WEIGHTS)


def _tie(model: Any) -> None:
    """Give both stacks of a T5 its embeddings."""
    if hasattr(model, "shared"):
        model.encoder.embed_tokens = model.shared
        model.decoder.embed_tokens = model.shared


@contextmanager
def _untied(model: Any) -> Iterator[None]:
    """Detach a T5's embeddings from both stacks while its weights are saved or loaded."""
    if hasattr(model, "shared"):
        model.encoder.embed_tokens = None
        model.decoder.embed_tokens = None
    yield
    _tie(model)


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Ignore torch's notes that torchao replaces this module: torchao is slower on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
