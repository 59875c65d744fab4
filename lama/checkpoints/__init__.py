"""Checkpoints: finding them, reading them, filling models from them, and writing lama's own.

model, tokenizer = load("gpt2")              # weights/gpt2/, else the Hugging Face cache, else downloaded
model, tokenizer = load("runs/shakespeare")  # a folder that `save` wrote, or one in Hugging Face's format
"""

import os
from pathlib import Path
from typing import Literal, TypeAlias, TypedDict, TypeVar, Unpack, overload

from lama.checkpoints.adapters import base_of, is_adapter, load_adapter, save_adapter, with_notes
from lama.checkpoints.export import export_huggingface
from lama.checkpoints.files import open_weights, weight_file
from lama.checkpoints.fill import check_dtype, filled
from lama.checkpoints.folder import save, write_tensors
from lama.checkpoints.formats import open_checkpoint
from lama.checkpoints.gguf_models import export_gguf
from lama.checkpoints.hub import EMBEDDED, Found, NotFound, find
from lama.checkpoints.nanogpt import META, tokenizer_from_meta
from lama.errors import LamaError, UsageError, quoted, warn
from lama.files import quoted_path
from lama.models.adapters import fold
from lama.models.bert import Bert, Classifier
from lama.models.encoder_decoder import Transformer
from lama.models.gpt import GPT
from lama.models.quantized import dtype_of
from lama.models.registry import Model
from lama.runtime.device import check_device
from lama.timing import timed
from lama.tokenizers import ByteTokenizer, Tokenizer, gpt2_tokenizer, load_huggingface_tokenizer

__all__ = [
    "EMBEDDED",
    "Found",
    "Model",
    "NotFound",
    "base_of",
    "export_gguf",
    "export_huggingface",
    "find",
    "is_adapter",
    "load",
    "load_adapter",
    "load_causal",
    "load_kind",
    "load_model",
    "load_tokenizer",
    "named_tokenizer",
    "open_checkpoint",
    "open_weights",
    "save",
    "save_adapter",
    "write_tensors",
]

T = TypeVar("T")
U = TypeVar("U")
GPTName: TypeAlias = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "lama-bpe"]


class LoadOptions(TypedDict, total=False):
    """The options of `load`."""

    dtype: str | None
    """float32, float16, bfloat16, int8 or int4; None: quantised if the file is, else float32."""
    float_activations: bool
    """Do not round the activations that quantised matrices multiply: slower, closer to the float model."""
    in_rows: bool
    """Keep weights of half precision in rows, for training, instead of the tiles that decoding reads."""
    device: str | None
    offline: bool
    revision: str | None
    """A branch, tag or commit on the hub."""
    tokenizer: str | Path | Tokenizer | None
    """Replaces the model's own: a tokenizer, or a name for `named_tokenizer`."""
    adapter: str | Path | None
    """The folder of an adapter (LoRA), which is folded into weights of a float dtype."""


@overload
def load(model: GPTName = "gpt2", **options: Unpack[LoadOptions]) -> tuple[GPT, Tokenizer]: ...
@overload
def load(model: str | Path, **options: Unpack[LoadOptions]) -> tuple[Model, Tokenizer]: ...
def load(model: str | Path = "gpt2", **options: Unpack[LoadOptions]) -> tuple[Model, Tokenizer]:
    """Load a model and its tokenizer. Raises LamaError.

    `model` is a path or a name, as in `find`, or the folder of an adapter, whose base model is then loaded.
    """
    return _load(None, model, object, **options)


def load_causal(model: str | Path = "gpt2", **options: Unpack[LoadOptions]) -> tuple[GPT, Tokenizer]:
    """Load a causal language model as `load` does. Raises LamaError also for models of another kind."""
    loaded, tokenizer = _load("gpt", model, object, **options)
    assert isinstance(loaded, GPT)
    return loaded, tokenizer


@overload
def load_kind(
    kind: Literal["transformer"], model: str | Path, tokenizers: type[T], **options: Unpack[LoadOptions]
) -> tuple[Transformer, T]: ...
@overload
def load_kind(
    kind: Literal["classifier"], model: str | Path, tokenizers: type[T], **options: Unpack[LoadOptions]
) -> tuple[Classifier, T]: ...
@overload
def load_kind(
    kind: Literal["bert"],
    model: str | Path,
    tokenizers: tuple[type[T], type[U]],
    **options: Unpack[LoadOptions],
) -> tuple[Bert, T | U]: ...
@overload
def load_kind(kind: str, model: str | Path, **options: Unpack[LoadOptions]) -> tuple[Model, Tokenizer]: ...
def load_kind(
    kind: str, model: str | Path, tokenizers: type | tuple[type, ...] = object, **options: Unpack[LoadOptions]
) -> tuple[object, object]:
    """Load a model of one kind of `lama.models.registry`, and a tokenizer of one of these types.

    Raises LamaError as `load` does, and for other kinds and types, before the weights are read.
    """
    return _load(kind, model, tokenizers, **options)


def _load(
    kind: str | None,
    model: str | Path,
    tokenizers: type | tuple[type, ...],
    *,
    dtype: str | None = None,
    float_activations: bool = False,
    in_rows: bool = False,
    device: str | None = None,
    offline: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    adapter: str | Path | None = None,
) -> tuple[Model, Tokenizer]:
    check_dtype(dtype)
    check_device(device)
    if is_adapter(Path(model)):
        if adapter is not None:
            rule = "a model can have only one adapter"
            raise UsageError(f"{rule}; got {quoted_path(model)} and {quoted_path(adapter)}. Name the model")
        model, adapter = base_of(Path(model)), model
    with timed("finding and opening the model"):
        checkpoint = open_checkpoint(find(model, offline=offline, revision=revision).path)
    where = quoted_path(model)
    if kind is not None and checkpoint.kind != kind:
        got = f"got a {quoted(checkpoint.kind, plain=True)} in {where}"
        raise LamaError(f"the model must be a {kind} here; {got}")
    with timed("the tokenizer"):
        if tokenizer is None:
            tokenizer = checkpoint.tokenizer()
        elif isinstance(tokenizer, str | Path):
            tokenizer = named_tokenizer(tokenizer)
    if not isinstance(tokenizer, tokenizers):
        types = tokenizers if isinstance(tokenizers, tuple) else (tokenizers,)
        wanted = " or ".join(each.__name__ for each in types)
        raise LamaError(f"the model must have a {wanted} here; got a {type(tokenizer).__name__} in {where}")
    with timed("loading the weights"):
        loaded = filled(checkpoint, dtype, device, float_activations, in_rows)
    if isinstance(loaded, GPT):
        loaded.name = str(model)
    if adapter is not None:
        if not isinstance(loaded, GPT):
            raise UsageError(f"an adapter needs a GPT; got a {checkpoint.kind} in {where}. Leave it out")
        load_adapter(adapter, loaded)
        tokenizer = with_notes(adapter, loaded, tokenizer)
        if dtype_of(loaded) is None:
            fold(loaded)
    rows = checkpoint.config.vocab_size
    if tokenizer.vocab_size > rows:
        sizes = f"{tokenizer.vocab_size:,} tokens for vocab_size={rows:,}"
        effect = f"text with a token from id {rows} on will be refused"
        warn(f"the tokenizer of {where} is larger than the model, {sizes}: {effect}")
    return loaded, tokenizer


def load_model(path: str | Path, *, dtype: str | None = None, device: str | None = None) -> Model:
    """Load the model in a folder, or in a weight file with its config.json beside it. Raises LamaError."""
    return filled(open_checkpoint(path), dtype, device)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a model's tokenizer; without one, GPT-2's if the vocabulary is as large. Raises LamaError."""
    return open_checkpoint(path).tokenizer()


def named_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer `gpt2` or `bytes`, one in a folder, or one in nanoGPT's meta.pkl. Raises LamaError.

    The folder is that of a model, or has the files of a Hugging Face tokenizer.
    """
    path = Path(name)
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    meta = path / META if os.path.isdir(path) else path
    if os.path.isfile(meta) and meta.suffix == ".pkl":
        return tokenizer_from_meta(meta)
    if not os.path.isdir(path):
        rule = f"gpt2, bytes, a folder with one, or a {META}"
        raise UsageError(f"a tokenizer must be {rule}; got {quoted_path(name)}")
    is_model = os.path.exists(path / "config.json") and weight_file(path) is not None
    return load_tokenizer(path) if is_model else load_huggingface_tokenizer(path)
