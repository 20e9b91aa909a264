"""GGUF format: a decoder-only student in one file, for llama.cpp and tools built on it."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator, Sequence
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
_FILE_TYPES = {
    "float16": "MOSTLY_F16",
    "float32": "ALL_F32",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
}
_MATRIX_TYPES = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k_m": "Q4_K"}  # of most matrices
_FOUR_BITS = ("q4_0", "q4_k_m")
# Where a row is no multiple of the type's block, in llama.cpp's order.
_NARROWER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_OF_LAYER = re.compile(r"^blk\.(\d+)\.(attn_v|ffn_down)\.weight$")


class GgufFormat:
    """Llama (SmolLM), Qwen2 and Qwen3 with a byte-level BPE."""

    kinds = ("causal",)
    quantizations = tuple(_FILE_TYPES)
    packages = ("xllamacpp", "tokenizers")

    def check(self, student: Student, quantize: str) -> str | None:
        with needs_extra("gguf", "the format gguf"):
            import gguf  # noqa: F401
        xllamacpp("comparing the format gguf in llama.cpp")
        if quantize in _FOUR_BITS and llama_quantizer() is None:
            raise UserError(
                f"--quantize {quantize} needs llama.cpp's own quantizer, which the installed "
                "package xllamacpp does not offer",
                hint="use --quantize q8_0, or another version of xllamacpp",
            )
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
                data_type = tensor_type(name, tensor.shape, config, quantize)
                writer.add_tensor(name, quantized(tensor, data_type), raw_dtype=data_type)
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


def tensor_type(name: str, shape: Sequence[int], config: Any, quantize: str) -> Any:
    """The type of a tensor, by its name in the file, as llama.cpp's own quantizer chooses it.

    Norms and biases stay in float32. With 4 bits, the output matrix (the embeddings, where it
    shares them) has 6 bits or more, and with q4_k_m so have the values and the outer feed-forward
    matrices of some layers: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp
    """
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or quantize == "float32":
        return types.F32
    if quantize == "float16":
        return types.F16
    chosen = _MATRIX_TYPES[quantize]
    output = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    if quantize in _FOUR_BITS and name == output:
        chosen = "Q6_K"
    layer = _OF_LAYER.match(name)
    if quantize == "q4_k_m" and layer and _has_more_bits(int(layer[1]), config.num_hidden_layers):
        chosen = "Q6_K"
    while shape[-1] % gguf.GGML_QUANT_SIZES[types[chosen]][0]:
        chosen = _NARROWER_BLOCKS.get(chosen, "F16")
    return types[chosen]


def _has_more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is in the first or the last eighth, or a third one in between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def llama_quantizer() -> Any:
    """llama.cpp's C function ``ggml_quantize_chunk``; None where the wheel does not export it."""
    runtime = xllamacpp("quantizing for llama.cpp")
    try:
        function = ctypes.CDLL(runtime.xllamacpp.__file__).ggml_quantize_chunk
    except (AttributeError, OSError):
        return None
    numbers = [ctypes.c_int64] * 3  # first value, rows, values of a row
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *numbers, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    return function


def quantized(tensor: Any, data_type: Any) -> Any:
    """tensor (R, C) or (C,) in float32 -> the bytes of its rows, or the tensor in floats."""
    import gguf
    import numpy as np

    if data_type.name not in _NARROWER_BLOCKS:  # the package gguf has the simpler types
        return gguf.quants.quantize(tensor, data_type)
    values = np.ascontiguousarray(tensor, np.float32)
    rows = values.shape[0]
    row_bytes = gguf.quants.quant_shape_to_byte_shape(values.shape, data_type)[-1]
    data = np.empty((rows, row_bytes), np.uint8)
    written = llama_quantizer()(
        int(data_type), values.ctypes.data, data.ctypes.data, 0, rows, values.shape[1], None
    )
    if written != data.nbytes:
        raise DsbsError(
            f"llama.cpp's quantizer wrote {written} bytes for {data.nbytes}",
            hint="use --quantize q8_0, or another version of xllamacpp",
        )
    return data


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
