"""GGUF format: a decoder-only student in one file, for llama.cpp and tools built on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError, needs_extra
from dsbs.exporting import decoder_script, save_tokenizer, write_prompt_format
from dsbs.students.backends.llama_server import MODEL, LlamaServerBackend, xllamacpp
from dsbs.students.student import Student

_LOAD = """params = xllamacpp.CommonParams()
params.model.path = str(here / "model.gguf")
params.port = 0
params.n_parallel = 1
params.n_ctx = CONTEXT
params.cpuparams.poll = params.cpuparams_batch.poll = 0  # spinning threads starve each other
params.offline = True
params.ui = False
params.verbosity = -1
server = xllamacpp.Server(params)"""
_WRITE = """    request = {
        "prompt": ids,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "samplers": ["temperature"],
    }
    response = server.handle_completions(request)
    print(response["choices"][0]["text"].strip(), flush=True)"""
# GGUF's architecture by a configuration's model_type.
_ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# How tokenizers split a text before merging, as tokenizer.json has it, and llama.cpp's name for it.
_GPT2 = ("ByteLevel", True)
_COMMON = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PRE_TOKENIZERS: dict[tuple[tuple[str, Any], ...], str] = {
    (_GPT2,): "gpt-2",
    (("Digits", True), _GPT2): "smollm",
    (("Split", _WORDS + r"\p{N}" + _COMMON), ("ByteLevel", False)): "qwen2",
    (("Split", _WORDS + r"\p{N}{1,3}" + _COMMON), ("ByteLevel", False)): "llama-bpe",
}
_SAMPLE = (
    "Hello  world!\n\n 12345 it's IT'S\t3.14 Ünï çödé 日本語 🙂\r\n   x_y=f(z); ... "
    "'quoted' -- naïve"
)
# The file's type by --quantize: of matrices; norms and biases stay in float32.
_FILE_TYPES = {"float16": "MOSTLY_F16", "float32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
_Q8_BLOCK = 32  # values that share a scale in q8_0


class GgufFormat:
    """Llama (SmolLM), Qwen2 and Qwen3 with a byte-level BPE."""

    kinds = ("causal",)
    quantizations = tuple(_FILE_TYPES)
    packages = ("xllamacpp", "tokenizers")

    def check(self, student: Student, quantize: str) -> str | None:
        with needs_extra("gguf", "the format gguf"):
            import gguf  # noqa: F401
        xllamacpp("comparing the format gguf in llama.cpp")
        config = student.backend.model.config
        if config.model_type not in _ARCHITECTURES:
            raise UserError(
                f"the format gguf supports {', '.join(_ARCHITECTURES)}, not {config.model_type}",
                hint="use --format ct2",
            )
        unsupported = _unsupported_features(config)
        if unsupported:
            raise UserError(
                f"{student.card.name} has {' and '.join(unsupported)}, which the format gguf does "
                "not support here",
                hint="use --format ct2",
            )
        if _pre_tokenizer(student) is None:
            raise UserError(
                f"the format gguf does not support the tokenizer of {student.card.name}: it needs "
                "a byte-level BPE that splits text like GPT-2, SmolLM, Qwen2 or Llama 3",
                hint="use --format ct2",
            )
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        import gguf

        config = student.backend.model.config
        writer = gguf.GGUFWriter(folder / MODEL, config.model_type)
        try:
            _add_configuration(writer, student, quantize)
            _add_tokenizer(writer, student)
            for name, tensor in _tensors(student.backend.model):
                data_type = _data_type(tensor, quantize)
                data = gguf.quants.quantize(tensor, data_type)
                writer.add_tensor(name, data, raw_dtype=data_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        write_prompt_format(student, folder)
        # All its files: with tokenizer.json alone, transformers finds no special tokens.
        student.backend.tokenizer.save_pretrained(folder)
        save_tokenizer(student, folder)
        _check_tokenizer(student, folder)

    def script(self, student: Student, quantize: str) -> str:
        context = student.card.max_input_tokens + student.card.max_target_tokens
        return decoder_script(
            student,
            imports="import tokenizers\nimport xllamacpp",
            load=_LOAD.replace("CONTEXT", str(context)),
            write=_WRITE,
        )


def _unsupported_features(config: Any) -> list[str]:
    features = []
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        features.append(f"rotary positions of type {rope_type}")
    if config.hidden_act != "silu":
        features.append(f"the activation {config.hidden_act}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        features.append("a sliding window")
    return features


def _data_type(tensor: Any, quantize: str) -> Any:
    import gguf

    types = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or quantize == "float32":  # llama.cpp wants norms and biases in float32
        return types.F32
    if quantize == "q8_0" and tensor.shape[-1] % _Q8_BLOCK == 0:
        return types.Q8_0
    return types.F16


def _add_configuration(writer: Any, student: Student, quantize: str) -> None:
    import gguf

    config = student.backend.model.config
    writer.add_name(student.card.name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[quantize]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    head_size = getattr(config, "head_dim", None)
    head_size = int(head_size or config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _pre_tokenizer(student: Student) -> str | None:
    """llama.cpp's name for how the tokenizer splits a text; None: not one that we know."""
    stored = json.loads(student.backend.tokenizer.backend_tokenizer.to_str())
    normalizer = (stored["normalizer"] or {"type": "NFC"})["type"]
    if stored["model"]["type"] != "BPE" or normalizer != "NFC":
        return None
    outer = stored["pre_tokenizer"] or {}
    key = []
    for step in outer.get("pretokenizers", [outer]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                key.append(("ByteLevel", step["use_regex"]))
            case {"type": "Digits"}:
                key.append(("Digits", step["individual_digits"]))
            case {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": "Isolated",
                "invert": False,
            }:
                key.append(("Split", regex))
            case _:
                return None
    return _PRE_TOKENIZERS.get(tuple(key))


def _check_tokenizer(student: Student, folder: Path) -> None:
    """Raises DsbsError where llama.cpp tokenizes a prompt differently from the student."""
    exported = LlamaServerBackend.load(folder, student.card)
    input_format = student.backend.input_format  # type: ignore[attr-defined]
    prompt = input_format.head + _SAMPLE + input_format.tail
    (token_ids,) = input_format.read([_SAMPLE])
    if exported.tokenize(prompt) != token_ids:
        raise DsbsError(
            f"llama.cpp tokenizes the prompts of {student.card.name} differently, e.g. {prompt!r}",
            hint="use --format ct2",
        )


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and arrays in llama.cpp's convention, with another order of rows in Llama."""
    import gguf

    config = model.config
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # llama.cpp uses the embeddings instead
        array = tensor.detach().float().cpu().numpy()
        if config.model_type == "llama" and ".q_proj." in name:
            array = _interleave_halves(array, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj." in name:
            array = _interleave_halves(array, config.num_key_value_heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise DsbsError(
                f"llama.cpp does not support the weights {name}", hint="use --format ct2"
            )
        yield gguf_name, array


def _interleave_halves(array: Any, heads: int) -> Any:
    """Interleave the two halves of each head's rows: (H·D, …) -> (H·D, …).

    llama.cpp rotates neighboring values, transformers a value of each half (Su et al., 2021,
    arXiv:2104.09864, eq. 34).
    """
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def _add_tokenizer(writer: Any, student: Student) -> None:
    import gguf

    tokenizer = student.backend.tokenizer
    input_format = student.backend.input_format  # type: ignore[attr-defined]
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    size = student.backend.model.config.vocab_size
    pieces = [f"[unused {index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for piece, index in stored["model"]["vocab"].items():
        pieces[index] = piece
        types[index] = gguf.TokenType.NORMAL
    for token in stored["added_tokens"]:
        pieces[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.USER_DEFINED
        if token["special"]:
            types[token["id"]] = gguf.TokenType.CONTROL
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(student))
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(input_format.end)
    writer.add_eot_token_id(tokenizer.eos_token_id)  # either token ends an answer
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    # A chat template writes its own start token.
    writer.add_add_bos_token(input_format.template == "plain" and input_format.head != "")
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template and input_format.template == "chat":
        writer.add_chat_template(tokenizer.chat_template)
