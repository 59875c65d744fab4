"""Models in GGUF files: for each architecture its names, its config and its tokenizer.

Source: ggml-org/llama.cpp, gguf-py/gguf/constants.py, src/llama-arch.cpp and src/llama-model.cpp.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lama.checkpoints.families import (
    FORMS,
    LLAMA_FIXED,
    SIZES,
    form_of,
    join_qkv,
    part_neighbours,
    permute_heads,
    root_of_width,
    split_gates,
    split_qkv,
)
from lama.checkpoints.fill import DTYPE_NAMES
from lama.checkpoints.folder import file_tensors
from lama.checkpoints.gguf import GGUF, write_gguf
from lama.checkpoints.gpt2 import with_biases
from lama.checkpoints.huggingface import checked_config, rename, tie
from lama.checkpoints.tensor import FileTensor, read_weights
from lama.errors import LamaError, quoted
from lama.files import checked
from lama.kernels import Quantized
from lama.models.adapters import refuse_adapter
from lama.models.config import config_from_dict
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import BITS, check_layout, dtype_of, weights_of
from lama.rotary import Rope
from lama.tokenizers import Tokenizer
from lama.tokenizers.base import TableTokenizer
from lama.tokenizers.gguf import keys_of_tokenizer, tokenizer_of_keys

NAMES = {
    "token_embd": "embed",
    "position_embd": "pos_embed",
    "output_norm": "ln_final",
    "output": "unembed",
    "blk.*.attn_norm": "blocks.*.ln1",
    "blk.*.attn_qkv": "blocks.*.attn.qkv",
    "blk.*.attn_q": "blocks.*.attn.q",
    "blk.*.attn_k": "blocks.*.attn.k",
    "blk.*.attn_v": "blocks.*.attn.v",
    "blk.*.attn_q_norm": "blocks.*.attn.qk_norm.q",
    "blk.*.attn_k_norm": "blocks.*.attn.qk_norm.k",
    "blk.*.attn_output": "blocks.*.attn.out",
    "blk.*.post_attention_norm": "blocks.*.ln1_post",
    "blk.*.ffn_norm": "blocks.*.ln2",
    "blk.*.ffn_gate": "blocks.*.mlp.gate",
    "blk.*.ffn_up": "blocks.*.mlp.up",
    "blk.*.ffn_down": "blocks.*.mlp.down",
    "blk.*.post_ffw_norm": "blocks.*.ln2_post",
}
THEIRS = {ours: name for name, ours in NAMES.items()}
FREQUENCIES = "rope_freqs.weight"  # divisors of rope's frequencies
SCALINGS = [(factor, 1.0, 4.0, 8192.0) for factor in (8.0, 32.0)]  # of Llama 3.1 and 3.2


@dataclass(frozen=True)
class Keys:
    """Reads the keys of an architecture. Raises LamaError for missing keys and wrong types."""

    file: GGUF

    @property
    def architecture(self) -> str:
        return checked(
            self.file.keys.get("general.architecture"), str, f"general.architecture in {self.file.source}"
        )

    def get(self, key: str, default: float | None = None) -> float:
        """A number; `default` replaces a missing one unless it is None."""
        name = f"{self.architecture}.{key}"
        value = self.file.keys.get(name, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # an equal value for each layer
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise LamaError(f"{self.file.source} must have {name}, a number; got {quoted(value)}")
        return value


@dataclass(frozen=True)
class Architecture:
    """The rules by which lama reads the models of one architecture."""

    family: str
    """Its `model_type` at Hugging Face."""
    fixed: Mapping[str, object]
    """Fields of GPTConfig that are the same for all models of the architecture."""
    more: Callable[[Keys], dict[str, object]] = lambda keys: {}
    """Gives further fields of GPTConfig."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names that differ from NAMES."""
    epsilon: str = "attention.layer_norm_rms_epsilon"
    interleaved: bool = False
    """Whether rope rotates adjacent rows of queries and keys."""
    fused: bool = False
    """Whether `ffn_up` has the rows of `gate`, then those of `up`."""


def rope(keys: Keys) -> dict[str, object]:
    theta = float(keys.get("rope.freq_base", 10000.0))
    own: dict[str, object] = {"positions": "rope", "rope_theta": theta}
    if f"{keys.architecture}.rope.dimension_count" in keys.file.keys:
        own["d_rotated"] = int(keys.get("rope.dimension_count"))
    name = f"{keys.architecture}.rope.scaling.type"
    kind = checked(keys.file.keys.get(name, "none"), str, f"{name} in {keys.file.source}")
    if kind == "linear":
        own["rope_scaling"] = (float(keys.get("rope.scaling.factor")),)
    elif kind not in ("none", "llama3"):
        raise LamaError(
            f"{keys.file.source} has rope.scaling.type={quoted(kind)}, which lama does not support"
        )
    if FREQUENCIES in keys.file.tensors:
        own["rope_scaling"] = _llama3_scaling(keys, theta)
    return own


def _llama3_scaling(keys: Keys, theta: float) -> tuple[float, ...]:
    """The scaling with the divisors in the file. Raises LamaError for other divisors than Llama 3's."""
    divisors = read_weights(keys.file.tensors[FREQUENCIES], "float32").reshape(-1)
    width = 2 * len(divisors)
    for scaling in SCALINGS:
        plain, scaled = Rope(width, theta).frequencies(), Rope(width, theta, scaling).frequencies()
        if np.allclose(plain / divisors, scaled, rtol=1e-4):
            return scaling
    got = f"got divisors from {divisors.min():.3g} to {divisors.max():.3g}"
    raise LamaError(f"{keys.file.source}: {FREQUENCIES} must be Llama 3.1's or 3.2's; {got}")


def gemma3(keys: Keys) -> dict[str, object]:
    width, layers = int(keys.get("embedding_length")), int(keys.get("block_count"))
    window = int(keys.get("attention.sliding_window"))
    pattern = int(keys.get("attention.sliding_window_pattern", 6))
    scale = int(keys.get("attention.key_length"))
    if layers == 62:  # the model of 27 billion parameters
        scale = width // int(keys.get("attention.head_count"))
    return (
        rope(keys)
        | root_of_width(width)
        | {
            "windows": tuple([window] * (max(pattern, 1) - 1) + [0]),
            "local_theta": float(keys.get("rope.freq_base_swa", 10000.0)),
            "attention_scale": max(scale, 1) ** -0.5,
            "logit_cap": float(keys.get("final_logit_softcapping", 0.0)),
        }
    )


def neox(keys: Keys) -> dict[str, object]:
    parallel = keys.get("use_parallel_residual", True)
    return rope(keys) | {"layout": "parallel" if parallel else "sequential"}


def phi3(keys: Keys) -> dict[str, object]:
    if any("rope_factors" in name for name in keys.file.tensors):
        raise LamaError(f"{keys.file.source} has rope_factors (longrope), which lama does not support")
    window = int(keys.get("attention.sliding_window", 0))
    return rope(keys) | ({"windows": (window,)} if window else {})


LLAMA = {**LLAMA_FIXED, "activation": "silu"}
LAYER_NORM = "attention.layer_norm_epsilon"
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("gpt2", {"activation": "gelu_new"}, epsilon=LAYER_NORM),
    "gptneox": Architecture("gpt_neox", {"activation": "gelu"}, neox, epsilon=LAYER_NORM),
    "llama": Architecture("llama", LLAMA, rope, interleaved=True),
    "qwen2": Architecture("qwen2", {**LLAMA, "qkv_bias": True}, rope),
    "qwen3": Architecture("qwen3", {**LLAMA, "qk_norm": "head"}, rope),
    "gemma3": Architecture(
        "gemma3_text", {**LLAMA, "activation": "gelu_new", "norm": "sandwich", "qk_norm": "head"}, gemma3
    ),
    "phi2": Architecture(
        "phi",
        {"activation": "gelu_new", "layout": "parallel_one_norm", "head_bias": True},
        rope,
        epsilon=LAYER_NORM,
    ),
    "phi3": Architecture("phi3", LLAMA, phi3, fused=True),
    "olmo2": Architecture(
        "olmo2",
        {**LLAMA, "norm": "output", "qk_norm": "all"},
        rope,
        {"blk.*.post_attention_norm": "blocks.*.ln1", "blk.*.post_ffw_norm": "blocks.*.ln2"},
    ),
    "smollm3": Architecture(
        "smollm3", {**LLAMA, "rope_layers": (True, True, True, False)}, rope, interleaved=True
    ),
}


def architecture_of(file: GGUF) -> Architecture:
    """The architecture of a file. Raises LamaError for an unknown one."""
    name = Keys(file).architecture
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise LamaError(f"{file.source} must have an architecture among {known}; got {quoted(name)}")
    return ARCHITECTURES[name]


def config_from_gguf(file: GGUF) -> GPTConfig:
    """The model that the keys of a file describe. Raises LamaError."""
    kind, keys, source = architecture_of(file), Keys(file), file.source
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LamaError(f"{source} must have token_embd.weight, a matrix; got none. Is it a language model?")
    heads = int(keys.get("attention.head_count"))
    ours: dict[str, object] = {
        "vocab_size": embedding.shape[0],
        "context_length": int(keys.get("context_length")),
        "d_model": int(keys.get("embedding_length")),
        "n_layers": int(keys.get("block_count")),
        "d_mlp": int(keys.get("feed_forward_length")),
        "n_heads": heads,
        "n_kv_heads": int(keys.get("attention.head_count_kv", heads)),
        "norm_epsilon": float(keys.get(kind.epsilon)),
        "tied": "output.weight" not in file.tensors,
    }
    if f"{keys.architecture}.attention.key_length" in file.keys:
        ours["d_head"] = int(keys.get("attention.key_length"))
    ends = [file.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens = dict.fromkeys(i for i in ends if type(i) is int and 0 <= i < embedding.shape[0])
    return checked_config(
        GPTConfig, {**ours, **kind.fixed, **kind.more(keys), "end_tokens": tuple(tokens)}, source
    )


def translate_gguf(file: GGUF, config: GPTConfig) -> dict[str, FileTensor]:
    """The tensors with lama's names and layout. Raises LamaError."""
    kind = architecture_of(file)
    names = {**NAMES, **kind.names}
    ours = {
        rename(name, names) or name: tensor for name, tensor in file.tensors.items() if name != FREQUENCIES
    }
    if kind.interleaved:
        part_neighbours(ours, config)
    if kind.fused:
        split_gates(ours, "up")
    if config.tied:
        tie(ours, "unembed.weight", "embed.weight", file.source)
    join_qkv(ours)
    return ours


def gguf_name(name: str) -> str:
    """lama's name of a tensor -> GGUF's, for error messages."""
    return rename(name, THEIRS) or name


def gguf_tokenizer(file: GGUF, folder: Path) -> TableTokenizer:
    """The tokenizer in a file. Raises LamaError."""
    return tokenizer_of_keys(file.keys, file.source, folder)


# --- writing

FILE_TYPES = {"float32": 0, "float16": 1, "int4": 2, "int8": 7, "bfloat16": 32}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def export_gguf(path: Path, model: GPT, tokenizer: Tokenizer, name: str) -> None:
    """Write a model, with weights of any dtype, and its tokenizer as one file that llama.cpp reads.

    Vectors are float32. Raises LamaError for a model without a matching architecture in GGUF, a tokenizer
    that GGUF cannot represent, and a file that cannot be written.
    """
    refuse_adapter(model, "to be exported")
    config, dtype = model.config, dtype_of(model) or DTYPE_NAMES[model.embed.weight.dtype]
    if dtype in BITS:
        check_layout(model, dtype)
    architecture = _architecture_for(config)
    keys: dict[str, object] = {
        "general.architecture": architecture,
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": 2,
    }
    keys |= {f"{architecture}.{key}": value for key, value in _own_keys(config, architecture).items()}
    keys |= keys_of_tokenizer(tokenizer, config.vocab_size)
    tensors: dict[str, tuple[str, FileTensor]] = {}
    for ours, tensor in _written(model, architecture).items():
        width = tensor.shape[-1]
        kind = "F32" if len(tensor.shape) == 1 else TYPES[tensor.dtype]
        if tensor.quantized is not None and width % 32:
            rule = f"rows of whole groups of 32 numbers for {tensor.dtype}"
            raise LamaError(f"a GGUF model must have {rule}; got {width} in {ours}. Export it as float16")
        tensors[ours] = kind, tensor
    if len(config.rope_scaling) == 4:
        plain, scaled = (
            Rope(config.d_head, config.rope_theta, s).frequencies() for s in ((), config.rope_scaling)
        )
        tensors[FREQUENCIES] = "F32", FileTensor(FREQUENCIES, "float32", plain.shape, lambda: plain / scaled)
    write_gguf(path, keys, tensors)


def _architecture_for(c: GPTConfig) -> str:
    """The GGUF architecture that computes the same as this model. Raises LamaError if there is none."""
    biases = dict.fromkeys(("bias", "qkv_bias", "out_bias", "mlp_bias"), True)
    shape: dict[str, object] = {name: getattr(c, name) for name in SIZES}
    if vars(c) | biases | {"end_tokens": ()} == vars(config_from_dict(GPTConfig, shape)):
        return "gpt2"
    if form := form_of(c):
        return form
    known = ", ".join(("gpt2", *FORMS.values()))
    raise LamaError(f"only models with the architecture of {known} can be written as GGUF; got another, {c}")


def _own_keys(c: GPTConfig, architecture: str) -> dict[str, object]:
    keys: dict[str, object] = {
        "context_length": c.context_length,
        "embedding_length": c.d_model,
        "block_count": c.n_layers,
        "feed_forward_length": c.d_mlp,
        "attention.head_count": c.n_heads,
        ARCHITECTURES[architecture].epsilon: float(c.norm_epsilon),
    }
    if architecture == "gpt2":
        return keys
    keys |= {
        "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.d_head,
        "attention.value_length": c.d_head,
        "rope.dimension_count": c.d_rotated,
        "rope.freq_base": float(c.rope_theta),
        "vocab_size": c.vocab_size,
    }
    if len(c.rope_scaling) == 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(c.rope_scaling[0])}
    return keys


def _written(model: GPT, architecture: str) -> dict[str, FileTensor]:
    """The tensors with GGUF's names and layout."""
    c, ours = model.config, _tensors_of(model)
    if architecture != "gpt2":
        split_qkv(ours, c)
        if ARCHITECTURES[architecture].interleaved:
            permute_heads(ours, c, lambda d: np.arange(d).reshape(2, -1).T.reshape(-1))
    else:
        ours = with_biases(ours)
    return {rename(name, THEIRS) or name: tensor for name, tensor in ours.items()}


def _tensors_of(model: GPT) -> dict[str, FileTensor]:
    """The parameters by name; a quantised matrix is one tensor."""
    found: dict[str, FileTensor] = {}
    for name, weight in weights_of(model).items():
        if isinstance(weight, Quantized):
            values, scales = file_tensors({name: weight}).values()
            found[name] = FileTensor(
                name, f"int{weight.bits}", weight.shape, values.read, quantized=(values, scales)
            )
        else:
            found |= file_tensors({name: weight})
    return found
