"""Code shared by Hugging Face's formats: tables of names, wrapped models, other heads, tied tensors."""

import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import TypeVar

import numpy as np

from lama.checkpoints.tensor import FileTensor, read_weights
from lama.errors import LamaError, abbreviated, quoted, warn
from lama.files import checked
from lama.models.config import config_from_dict

Config = TypeVar("Config")
ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
} | {name: name for name in ("gelu", "relu", "silu", "tanh", "quick_gelu", "relu2")}
"""transformers' names -> lama's."""
SAMPLING: dict[str, type[float] | type[int]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_mlp",
    "hidden_act": "activation",
}
"""Keys that most configs share -> lama's fields."""
# Keys that may be null, meaning the default.
OPTIONAL = ("n_inner", "pad_token_id", "intermediate_size", "num_key_value_heads", "head_dim")
# Parts of names that torch.compile, DistributedDataParallel, FSDP, Opacus and checkpointed blocks add.
WRAPPERS = frozenset({"_orig_mod", "module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def read_fields(
    fields: Mapping[str, object],
    table: Mapping[str, str],
    required: Mapping[str, object],
    of: type,
    source: object,
    synonyms: Mapping[str, str],
) -> dict[str, object]:
    """The fields for a lama config of class `of` in a `config.json`; `table` maps its keys to lama's fields.

    Synonyms take precedence, as in transformers. `required` has the only supported values of some keys.
    Raises LamaError for the first key that lama does not support.
    """
    for key, value in required.items():
        if fields.get(key, value) != value:
            got = f"got {quoted(fields[key])}, which lama does not support"
            raise LamaError(f"{source} must have {key}={value!r}; {got}")
    ours: dict[str, object] = {}
    keys = {**table, **{key: table[meaning] for key, meaning in synonyms.items()}}
    for key, name in keys.items():
        if key not in fields or (fields[key] is None and key in OPTIONAL):
            continue
        found = checked(fields[key], type(getattr(of, name)), f"{key} in {source}")
        if name == "activation" and found not in ACTIVATIONS:
            raise LamaError(f"{source} must have {key} among {', '.join(ACTIVATIONS)}; got {quoted(found)}")
        ours[name] = ACTIVATIONS[found] if name == "activation" else found
    return ours


def end_tokens(
    fields: Mapping[str, object], generation: Mapping[str, object] | None, source: object
) -> list[int]:
    """The distinct ids of eos_token_id: one id, a list, or null. Raises LamaError.

    `generation` is the content of generation_config.json, whose end tokens take precedence.
    """
    if generation and generation.get("eos_token_id") is not None:
        fields, source = generation, "generation_config.json"
    value = fields.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(checked(each, int, f"eos_token_id in {source}") for each in values))


def recommended(generation: Mapping[str, object] | None) -> dict[str, float]:
    """The fields of `Sampling` in generation_config.json; do_sample=false is greedy. Raises LamaError."""
    found: dict[str, float] = {}
    for name, kind in SAMPLING.items():
        if generation and generation.get(name) is not None:
            found[name] = checked(generation[name], kind, f"{name} in generation_config.json")
    return found | {"temperature": 0.0} if generation and generation.get("do_sample") is False else found


def checked_config(kind: type[Config], fields: Mapping[str, object], source: object) -> Config:
    """A config of this class. Raises LamaError."""
    try:
        return config_from_dict(kind, fields)
    except (ValueError, TypeError) as error:
        raise LamaError(f"{source}: {error}") from error


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """Rename a tensor's layer by a table in which `*` is the block's number; None if it is not in the table.

    With GPT-2's table `h.3.ln_1.weight` becomes `blocks.3.ln1.weight`.
    """
    layer, _, parameter = name.rpartition(".")
    number = re.search(r"(?<=\.)\d+(?=\.)", layer)
    pattern = layer if number is None else f"{layer[: number.start()]}*{layer[number.end() :]}"
    if pattern not in table:
        return None
    return f"{table[pattern].replace('*', '' if number is None else number[0])}.{parameter}"


def renamed(
    tensors: Mapping[str, FileTensor],
    lama_name: Callable[[str], str | None],
    heads: tuple[str, ...],
    source: object,
) -> dict[str, FileTensor]:
    """A file's tensors under lama's names, without the names of wrappers; unknown tensors keep their names.

    Tensors of `heads`, for other tasks, are left out, and a warning names them. Raises LamaError if two
    tensors get the same name.
    """
    found: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        own = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        key = lama_name(own) or own
        if key in found:
            got = quoted(f"{found[key].name} and {name}", plain=True)
            raise LamaError(f"{source} must hold each tensor once; got {got}")
        found[key] = tensor
    if left_out := [name for name in found if name.startswith(heads)]:
        names = abbreviated([found.pop(name).name for name in left_out])
        warn(f"{source}: left out {names}, which belong to heads for other tasks")
    return found


def tie(tensors: dict[str, FileTensor], head: str, body: str, source: object, advice: str = "") -> None:
    """Keep one of two tied tensors, under the name `body`. A file may have both, or one under either name.

    Raises LamaError if they differ.
    """
    if head not in tensors:
        return
    other = tensors.pop(head)
    first = tensors.setdefault(body, other)
    if first is other:
        return
    # Compared by digest, so that only one of them is in memory at a time.
    if first.shape != other.shape or _digest(first) != _digest(other):
        names = quoted(f"{other.name} equal to {first.name}", plain=True)
        raise LamaError(f"{source} must have {names} in a tied model; got different numbers{advice}")


def _digest(tensor: FileTensor) -> bytes:
    return sha256(read_weights(tensor, "float32").reshape(-1).view(np.uint8).data).digest()
