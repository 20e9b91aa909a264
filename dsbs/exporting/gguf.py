"""GGUF: a decoder-only student in one file, for llama.cpp and what is built on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.exporting.causal_script import causal_script
from dsbs.exporting.formats import save_tokenizer, write_wording
from dsbs.students import Student
from dsbs.students.backends.llama_server import MODEL, LlamaCpp, xllamacpp

_LOAD = """params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = str(here / "model.gguf"), 0, 1, CONTEXT
params.cpuparams.poll = params.cpuparams_batch.poll = 0  # spinning threads starve each other
params.offline, params.ui, params.verbosity = True, False, -1
server = xllamacpp.Server(params)"""
_WRITE = """    wanted = {"prompt": ids, "max_tokens": MOST, "temperature": 0, "samplers": ["temperature"]}
    said = server.handle_completions(wanted)
    print(said["choices"][0]["text"].strip(), flush=True)"""
# Of a configuration's model_type: GGUF calls them the same.
_ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# Ways to split a text before the merges, as tokenizer.json has them, and llama.cpp's names of them.
_GPT2 = ("ByteLevel", True)
_SHARED = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPLITS: dict[tuple[tuple[str, Any], ...], str] = {
    (_GPT2,): "gpt-2",
    (("Digits", True), _GPT2): "smollm",
    (("Split", _WORDS + r"\p{N}" + _SHARED), ("ByteLevel", False)): "qwen2",
    (("Split", _WORDS + r"\p{N}{1,3}" + _SHARED), ("ByteLevel", False)): "llama-bpe",
}
_SAMPLE = "Hello  world!\n\n 12345 it's IT'S\t3.14 Ünï çödé 日本語 🙂\r\n   x_y=f(z); ... 'quoted' -- naïve"
# Of a --quantize, the file's type: matrices are so, norms and biases in float32.
_FILE_TYPES = {"float16": "MOSTLY_F16", "float32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
_ROW = 32  # numbers that share a scale in q8_0


class GgufFormat:
    """Of Llama (SmolLM), Qwen2 and Qwen3 with a byte-level BPE."""

    kinds = ("causal",)
    quantizations = tuple(_FILE_TYPES)
    packages = ("xllamacpp", "tokenizers")

    def check(self, student: Student, quantize: str) -> str | None:
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise UserError(
                "the format gguf needs the package gguf", hint="pip install 'dsbs[gguf]'"
            ) from None
        xllamacpp("the format gguf is compared in llama.cpp, which")
        config = student.engine.model.config
        if config.model_type not in _ARCHITECTURES:
            raise UserError(
                f"the format gguf carries {', '.join(_ARCHITECTURES)} here, not {config.model_type}",
                hint="give --format ct2",
            )
        rope = config.rope_parameters["rope_type"]
        left_out = [
            what
            for what, is_there in (
                (f"rotary positions of type {rope}", rope != "default"),
                (f"the activation {config.hidden_act}", config.hidden_act != "silu"),
                (
                    "a sliding window",
                    "sliding_attention" in (getattr(config, "layer_types", None) or []),
                ),
            )
            if is_there
        ]
        if left_out:
            raise UserError(
                f"{student.card.name} has {' and '.join(left_out)}, not written into a GGUF file here",
                hint="give --format ct2",
            )
        if _split(student) is None:
            raise UserError(
                f"{student.card.name}'s tokenizer is not written into a GGUF file here: it is no byte-level BPE that splits as "
                "GPT-2's, SmolLM's, Qwen2's or Llama 3's does",
                hint="give --format ct2",
            )
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        import gguf

        config = student.engine.model.config
        writer = gguf.GGUFWriter(folder / MODEL, config.model_type)
        try:
            _describe(writer, student, quantize)
            _add_tokenizer(writer, student)
            for name, tensor in _tensors(student.engine.model):
                kind = _kind(tensor, quantize)
                writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        write_wording(student, folder)
        # all of it: of a file with tokenizer.json beside it, transformers reads no special tokens
        student.engine.tokenizer.save_pretrained(folder)
        save_tokenizer(student, folder)
        _check_tokenizer(student, folder)

    def script(self, student: Student, quantize: str) -> str:
        context = student.card.max_input_tokens + student.card.max_target_tokens
        return causal_script(
            student,
            imports="import tokenizers\nimport xllamacpp",
            load=_LOAD.replace("CONTEXT", str(context)),
            write=_WRITE,
        )


def _kind(tensor: Any, quantize: str) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if (
        tensor.ndim == 1 or quantize == "float32"
    ):  # norms and biases are few, and llama.cpp wants them so
        return kinds.F32
    return kinds.Q8_0 if quantize == "q8_0" and tensor.shape[-1] % _ROW == 0 else kinds.F16


def _describe(writer: Any, student: Student, quantize: str) -> None:
    import gguf

    config = student.engine.model.config
    writer.add_name(student.card.name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[quantize]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    size = int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _split(student: Student) -> str | None:
    """llama.cpp's name of how the tokenizer splits a text; None: it has none that is known here."""
    stored = json.loads(student.engine.tokenizer.backend_tokenizer.to_str())
    if (
        stored["model"]["type"] != "BPE"
        or (stored["normalizer"] or {"type": "NFC"})["type"] != "NFC"
    ):
        return None
    outer = stored["pre_tokenizer"] or {}
    key = []
    for part in outer.get("pretokenizers", [outer]):
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                key.append(("ByteLevel", part["use_regex"]))
            case {"type": "Digits"}:
                key.append(("Digits", part["individual_digits"]))
            case {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            }:
                key.append(("Split", regex))
            case _:
                return None
    return _SPLITS.get(tuple(key))


def _check_tokenizer(student: Student, folder: Path) -> None:
    """Raise DsbsError where llama.cpp reads a prompt as other ids than the student does."""
    made = LlamaCpp.load(folder, student.card)
    wording = student.engine.wording  # type: ignore[attr-defined]
    prompt = wording.head + _SAMPLE + wording.tail
    (ours,), theirs = wording.read([_SAMPLE]), made.pieces(prompt)
    if theirs != ours:
        raise DsbsError(
            f"llama.cpp would not read {student.card.name}'s prompts as the student does: other tokens for {prompt!r}",
            hint="give --format ct2",
        )


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and arrays as llama.cpp has them; rows of queries and keys are in another order in its Llama."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]], config.num_hidden_layers
    )
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue  # llama.cpp takes the embeddings where there is none
        array = tensor.detach().float().cpu().numpy()
        if config.model_type == "llama" and ".q_proj." in name:
            array = _turned(array, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj." in name:
            array = _turned(array, config.num_key_value_heads)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise DsbsError(
                f"llama.cpp has no place for the weights {name}", hint="give --format ct2"
            )
        yield found, array


def _turned(array: Any, heads: int) -> Any:
    """(H·D, …) -> the same with each head's halves interleaved, since llama.cpp rotates neighbours where transformers takes
    a number of each half (Su et al., 2021, arXiv:2104.09864, eq. 34, and its way of writing it)."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def _add_tokenizer(writer: Any, student: Student) -> None:
    import gguf

    tokenizer, wording = student.engine.tokenizer, student.engine.wording  # type: ignore[attr-defined]
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    size = student.engine.model.config.vocab_size
    pieces, types = [f"[unused {index}]" for index in range(size)], [gguf.TokenType.UNUSED] * size
    for piece, index in stored["model"]["vocab"].items():
        pieces[index], types[index] = piece, gguf.TokenType.NORMAL
    for added in stored["added_tokens"]:
        pieces[added["id"]] = added["content"]
        types[added["id"]] = (
            gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        )
    merges = stored["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(student))
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_eos_token_id(wording.end)
    writer.add_eot_token_id(tokenizer.eos_token_id)  # either one ends an answer
    writer.add_pad_token_id(tokenizer.pad_token_id)
    begins = wording.template == "plain" and wording.head != ""
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(begins)  # a chat template writes its own
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template and wording.template == "chat":
        writer.add_chat_template(tokenizer.chat_template)
