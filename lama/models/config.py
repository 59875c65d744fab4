"""The parts that the configs of all models share: checks of their fields, and reading from JSON."""

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from lama.attention import SIMILARITIES
from lama.blocks import NORMS
from lama.embeddings import POSITIONS
from lama.errors import quoted
from lama.layers import ACTIVATIONS

CHOICES: dict[str, Collection[str]] = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "positions": POSITIONS,
    "similarity": SIMILARITIES,
}
LAYERS = ("n_layers", "n_encoder_layers", "n_decoder_layers")
SIZES = ("vocab_size", "context_length", "d_model", *LAYERS, "n_heads", "n_kv_heads", "d_mlp", "n_classes")
MOST = dict.fromkeys(LAYERS, 10_000) | {"context_length": 1 << 20}  # a config may come from a file
LARGEST = (1 << 31) - 1  # the limit of other whole numbers: kernels count in 32 bits
TABLE = 1 << 26  # the most numbers of a table of sinusoids: no tensor in a file confirms its size


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen dataclass with at least these sizes."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    @property
    def context_length(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...


Config = TypeVar("Config")


def check_config(config: ModelConfig, choices: Mapping[str, Collection[str]] = CHOICES) -> None:
    """Replace defaults such as d_mlp=0, then check the fields with known names, for `__post_init__`.

    A field must have the type of its default. Fields with the default None are biases, and become `bias`.
    Raises ValueError that names the field and its value.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}

    def fill(name: str, value: object) -> None:
        fields[name] = value
        object.__setattr__(config, name, value)

    for field in dataclasses.fields(config):
        value, kind = fields[field.name], bool if field.default is None else type(field.default)
        if field.default is None and value is None:
            fill(field.name, fields["bias"])
            continue
        if type(value) is not kind and not (type(value) is int and kind is float):
            got = f"{field.name}={quoted(value)}"
            raise ValueError(f"{field.name} must be of type {kind.__name__}; got {got}")
        if type(value) is int and value > (most := MOST.get(field.name, LARGEST)):
            raise ValueError(f"{field.name} must be at most {most:,}; got {field.name}={quoted(value)}")
    mlp = fields.get("mlp", True)
    if fields.get("d_mlp") == 0 and mlp:
        fill("d_mlp", 4 * config.d_model)
    if fields.get("n_kv_heads") == 0:
        fill("n_kv_heads", config.n_heads)
    for name in SIZES:
        # A model may have no layers: its predictions then depend on a single token.
        least = 0 if name in LAYERS or (name == "d_mlp" and not mlp) else 1
        if fields.get(name, 1) < least:
            raise ValueError(f"{name} must be at least {least}; got {name}={fields[name]}")
    if not mlp and fields["d_mlp"]:
        raise ValueError(f"d_mlp must be 0 with mlp=False; got d_mlp={fields['d_mlp']}")
    for name, allowed in choices.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {quoted(fields[name])}")
    if fields.get("positions") == "sinusoidal" and config.context_length * config.d_model > TABLE:
        got = f"context_length={config.context_length}, d_model={config.d_model}"
        raise ValueError(f"sinusoidal positions must be at most {TABLE:,} numbers; got {got}")
    epsilon = fields.get("norm_epsilon", 0)
    if not 0 <= epsilon < 1:
        raise ValueError(f"norm_epsilon must be at least 0 and below 1; got norm_epsilon={epsilon}")
    if not fields.get("d_head") and config.d_model % config.n_heads:
        got = f"d_model={config.d_model}, n_heads={config.n_heads}"
        raise ValueError(f"d_model must be a multiple of n_heads; got {got}")
    if fields.get("d_head") == 0:
        fill("d_head", config.d_model // config.n_heads)
    if fields.get("d_head", 1) < 1:
        raise ValueError(f"d_head must be at least 1; got d_head={fields['d_head']}")


def check_length(n: int, config: ModelConfig) -> None:
    """Raise ValueError if n tokens exceed the model's `context_length`."""
    if n > (most := config.context_length):
        raise ValueError(f"tokens must fit context_length; got {n} tokens, context_length={most}")


def config_from_dict(kind: type[Config], fields: Mapping[str, object]) -> Config:
    """A config of this class from JSON. Raises ValueError for unknown fields, and as the class does."""
    known = inspect.signature(kind).parameters
    if unknown := sorted(set(fields) - set(known)):
        got = quoted(", ".join(unknown), plain=True)
        raise ValueError(f"config fields must be among {', '.join(sorted(known))}; got {got}")
    # JSON has no tuples.
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return kind(**values)
