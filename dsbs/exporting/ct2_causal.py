"""What is a decoder's own in the format ct2: the converter's loaders, and ``predict.py``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dsbs.errors import UserError
from dsbs.exporting.causal_script import causal_script
from dsbs.students import Student

_WRITE = """    found = model.generate_batch(
        [[whole.id_to_token(i) for i in ids]], max_length=MOST, min_length=0, beam_size=1,
        include_prompt_in_result=False, end_token=wording["stops"],
    )
    print(whole.decode(found[0].sequences_ids[0]).strip(), flush=True)"""
# Of a configuration's model_type, the converter's own; these are held against transformers by the tests.
LOADERS = {
    "gpt2": "GPT2Loader",
    "llama": "LlamaLoader",
    "qwen2": "Qwen2Loader",
    "qwen3": "Qwen3Loader",
}


def check(student: Student) -> None:
    """Raises UserError for a model that the converter does not know, or gets wrong."""
    config = student.engine.model.config
    if config.model_type not in LOADERS:
        raise UserError(
            f"the format ct2 carries {', '.join(LOADERS)} and T5 here, not {config.model_type}",
            hint="try --format torch",
        )
    trait = _left_out(config)
    if trait:
        raise UserError(
            f"{student.card.name} has {trait}, which CTranslate2's converter leaves out",
            hint="try --format torch",
        )


def _left_out(config: Any) -> str | None:
    """What of a configuration the converter passes over in silence."""
    if config.model_type == "gpt2":
        plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        return None if plain else "attention scaled in a way of its own"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        return "a sliding window"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type != "qwen3" and size * config.num_attention_heads != config.hidden_size:
        return f"heads of {size} numbers, which are not hidden_size / num_attention_heads"
    return None


def loader_of(model_type: str) -> Any:
    """The converter's loader, right for vocabularies with gaps and for embeddings beyond them."""
    base = getattr(import_module("ctranslate2.converters.transformers"), LOADERS[model_type])

    class Loader(base):  # type: ignore[misc,valid-type]
        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            known = {index: piece for piece, index in tokenizer.get_vocab().items()}
            return [
                known.get(index, f"<unused_{index}>") for index in range(model.config.vocab_size)
            ]

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            super().set_config(config, model, tokenizer)
            if config.unk_token is None:
                config.unk_token = ""
            if model_type == "gpt2":
                config.layer_norm_epsilon = model.config.layer_norm_epsilon

    return Loader()


def script(student: Student) -> str:
    return causal_script(
        student,
        imports="import ctranslate2\nimport tokenizers",
        load="model = ctranslate2.Generator(str(here))",
        write=_WRITE,
    )
