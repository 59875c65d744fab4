"""Checkpoints: finding them, reading them, filling a model from them, and writing lama's own.

model, tokenizer = load("gpt2")              # weights/gpt2/, else the Hugging Face cache, else downloaded
model, tokenizer = load("runs/shakespeare")  # a folder that `save` wrote, or one in Hugging Face's format
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from lama.checkpoints.bert import bert_name, config_from_bert, is_bert, translate_bert
from lama.checkpoints.export import export_huggingface
from lama.checkpoints.files import ENDINGS, check_regular, open_weights, read_json, unreadable, weight_file
from lama.checkpoints.fill import check_dtype, filled
from lama.checkpoints.folder import FORMAT, described_by_lama, is_own_folder, save, tokenizer_from_lama, write_tensors
from lama.checkpoints.gpt2 import config_from_huggingface, gpt2_name, translate
from lama.checkpoints.hub import EMBEDDED, Found, NotFound, find
from lama.checkpoints.nanogpt import META, config_from_nanogpt, tokenizer_from_meta
from lama.checkpoints.stored import StoredTensor
from lama.checkpoints.torch_files import read_torch
from lama.device import check_device
from lama.errors import LamaError, UsageError, quoted, warn
from lama.files import quoted_path
from lama.models.bert import Bert
from lama.models.gpt import GPT
from lama.tokenizers import ByteTokenizer, Tokenizer, gpt2_tokenizer, load_huggingface_tokenizer, load_wordpiece_tokenizer

GPT2_ROWS = (50257, 50304)  # of GPT-2's vocabulary, and of that rounded up to a multiple of 64, as nanoGPT and llm.c have it

__all__ = [
    "EMBEDDED",
    "Found",
    "NotFound",
    "describe",
    "export_huggingface",
    "find",
    "is_own_folder",
    "kind_at",
    "load",
    "load_gpt",
    "load_kind",
    "load_model",
    "load_tokenizer",
    "named_tokenizer",
    "open_weights",
    "read_json",
    "save",
    "write_tensors",
]


def load(
    model: str | Path = "gpt2",
    *,
    dtype: str = "float32",
    device: str | None = None,
    offline: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
) -> tuple[Any, Tokenizer]:
    """A model, its weights in `dtype` (float32, float16, bfloat16, int8 or int4) on `device`, and its tokenizer.

    int8 and int4 are of the matrices, rounded as they are read; a model that was saved so is loaded as it is.

    `model` is a path or a name: see `lama.checkpoints.hub.find`. `tokenizer`, in place of the model's own, is one, or what
    `named_tokenizer` takes. Raises LamaError.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "offline": offline, "revision": revision, "tokenizer": tokenizer}
    return load_kind(None, model, **options)


def load_kind(
    kind: str | None,
    model: str | Path,
    tokenizers: type | UnionType = object,
    *,
    dtype: str = "float32",
    device: str | None = None,
    offline: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
) -> tuple[Any, Any]:
    """`load` for what needs a model of one kind of `lama.models.kinds`, and a tokenizer of one of some types.

    Raises LamaError for others too, before the weights are read.
    """
    check_dtype(dtype)
    check_device(device)
    found = describe(find(model, offline=offline, revision=revision).path)
    where = quoted_path(model)
    if kind is not None and found.kind != kind:
        raise LamaError(f"the model must be a {kind} here; got a {quoted(found.kind, plain=True)} in {where}")
    if tokenizer is None:
        tokenizer = tokenizer_of(found)
    elif isinstance(tokenizer, str | Path):
        tokenizer = named_tokenizer(tokenizer)
    if not isinstance(tokenizer, tokenizers):
        wanted = " or ".join(each.__name__ for each in get_args(tokenizers) or (tokenizers,))
        raise LamaError(f"the model must have a {wanted} here; got a {type(tokenizer).__name__} in {where}")
    loaded, rows = load_described(found, dtype, device), found.config.vocab_size
    if tokenizer.vocab_size > rows:
        sizes = f"{tokenizer.vocab_size:,} tokens for vocab_size={rows:,}"
        warn(f"the tokenizer of {where} is larger than the model, {sizes}: text with a token from id {rows} on will be refused")
    return loaded, tokenizer


def load_gpt(model: str | Path = "gpt2", **options: Any) -> tuple[GPT, Tokenizer]:
    """`load_kind` of a GPT."""
    return load_kind("gpt", model, **options)


@dataclass(frozen=True)
class Description:
    """A model on the disk: all that is known of it before its weights are read."""

    folder: Path
    weights: Path
    fields: Mapping[str, Any]
    """The content of config.json, or nanoGPT's arguments."""
    kind: str
    """A name of `lama.models.kinds`."""
    config: Any
    make: Callable[[Any], Any]
    """`make(config)` is the model, unfilled."""
    translate: Callable[[Mapping[str, StoredTensor]], Mapping[str, StoredTensor]] = dict
    """The file's tensors under lama's names. Raises LamaError."""
    name_in_file: Callable[[str], str] = str
    """The file's name for one of lama's."""
    dtype: str | None = None
    """int8 or int4 for a model that was saved quantised."""
    tensors: Mapping[str, StoredTensor] | None = None
    """The file's tensors, where its description lies among them, as in nanoGPT's file."""


def describe(path: str | Path) -> Description:
    """The model in a folder, or in a weight file with its config.json beside it. Raises LamaError."""
    folder, weights = _places(Path(path))
    source, file = quoted_path(folder / "config.json"), quoted_path(weights)
    check_regular(weights)
    tensors, arguments = read_torch(weights) if weights.suffix in (".pt", ".pth") else (None, None)
    if arguments is not None:
        config = config_from_nanogpt(arguments, file)
        translation = partial(translate, config=config, source=file, conv1d=False)
        return Description(folder, weights, arguments, "gpt", config, partial(GPT, seed=None), translation, gpt2_name, tensors=tensors)
    fields = read_json(folder / "config.json")
    if fields.get("format") == FORMAT:
        make, own = described_by_lama(fields, source)
        return Description(folder, weights, fields, fields["model"], own, make, dtype=fields.get("dtype"))
    if is_bert(fields):
        bert, of_bert = config_from_bert(fields, source), partial(translate_bert, source=file)
        return Description(folder, weights, fields, "bert", bert, partial(Bert, seed=None), of_bert, bert_name)
    generation = folder / "generation_config.json"
    config = config_from_huggingface(fields, source, read_json(generation) if os.path.exists(generation) else None)
    translation = partial(translate, config=config, source=file)
    return Description(folder, weights, fields, "gpt", config, partial(GPT, seed=None), translation, gpt2_name)


def kind_at(path: str | Path) -> str:
    """The kind of the model there: a name of `lama.models.kinds`. Raises LamaError."""
    return describe(path).kind


def load_model(path: str | Path, *, dtype: str = "float32", device: str | None = None) -> Any:
    """The model in a folder, or in a weight file with its config.json beside it. Raises LamaError."""
    return load_described(describe(path), dtype, device)


def load_described(found: Description, dtype: str = "float32", device: str | None = None) -> Any:
    """The model, its weights read. Raises LamaError."""
    if found.dtype is not None and dtype not in ("float32", found.dtype):
        raise LamaError(f"a quantised model is loaded as it is; got dtype={dtype} for one of {found.dtype} in {quoted_path(found.folder)}")
    return filled(
        found.make,
        found.config,
        found.translate(open_weights(found.weights) if found.tensors is None else found.tensors),
        quoted_path(found.weights),
        dtype="float32" if found.dtype else dtype,
        device=device,
        name_in_file=found.name_in_file,
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that belongs to the model there; GPT-2's own for a model of its vocabulary that has none. Raises LamaError."""
    return tokenizer_of(describe(path))


def tokenizer_of(found: Description) -> Tokenizer:
    """The tokenizer that lies beside a model; GPT-2's own for a model of its vocabulary that has none. Raises LamaError."""
    folder = found.folder
    if found.fields.get("format") == FORMAT:
        return tokenizer_from_lama(found.fields, folder)
    if found.kind == "bert":
        return load_wordpiece_tokenizer(folder)
    if any(os.path.exists(folder / name) for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return load_huggingface_tokenizer(folder)
    if found.config.vocab_size in GPT2_ROWS:
        return gpt2_tokenizer()
    if os.path.exists(folder / META):
        return tokenizer_from_meta(folder / META)
    files = f"tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt, nor {META}, in {quoted_path(folder)}"
    raise LamaError(f"a model must have its tokenizer beside it; got no {files}; copy it there or give another as tokenizer")


def named_tokenizer(name: str | Path) -> Tokenizer:
    """`gpt2`, `bytes`, the tokenizer in a folder (a model's, or of Hugging Face's files alone), or in nanoGPT's meta.pkl.

    Raises LamaError.
    """
    path = Path(name)
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    if os.path.isfile(path) and path.suffix == ".pkl":
        return tokenizer_from_meta(path)
    if not os.path.isdir(path):
        raise UsageError(f"a tokenizer must be gpt2, bytes, a folder with one, or a {META}; got {quoted_path(name)}")
    if os.path.exists(path / META):
        return tokenizer_from_meta(path / META)
    is_model = os.path.exists(path / "config.json") and weight_file(path) is not None
    return load_tokenizer(path) if is_model else load_huggingface_tokenizer(path)


def _places(path: Path) -> tuple[Path, Path]:
    """The folder with the config, and the weight file. Raises LamaError if there is none."""
    if os.path.isfile(path) and path.name.endswith(ENDINGS):
        return path.parent, path
    if not os.path.lexists(path):
        raise LamaError(f"a model must be a folder or a weight file; got {quoted_path(path)}, which is not there")
    weights = weight_file(path)
    if weights is None:
        raise LamaError(unreadable(path))
    return path, weights
