"""Code shared by Hugging Face's formats: configs by a table of keys, wrapped models, heads for other tasks, tied tensors."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from lama.checkpoints.stored import StoredTensor, read_weights
from lama.errors import LamaError, quoted, warn
from lama.files import checked

ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "quick_gelu": "quick_gelu",
}
"""transformers' names and lama's."""
OPTIONAL = ("n_inner", "pad_token_id")  # keys that may be null, which means the default
# Parts of a name that torch.compile, DistributedDataParallel, FSDP, Opacus and checkpointed blocks put around a model's own.
WRAPPERS = frozenset({"_orig_mod", "module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def read_fields(
    fields: Mapping[str, Any], table: Mapping[str, str], required: Mapping[str, Any], of: type, source: object, synonyms: Mapping[str, str]
) -> dict[str, Any]:
    """The fields of a lama config `of` that a `config.json` gives; `table` has theirs -> ours.

    A synonym counts before the name that it stands for, as in transformers. `required` has the value that a key must have where it
    is present. Raises LamaError naming the first key that lama does not support or cannot read.
    """
    for key, value in required.items():
        if fields.get(key, value) != value:
            raise LamaError(f"{source} must have {key}={value!r}; got {quoted(fields[key])}, which lama does not support")
    ours: dict[str, Any] = {}
    for key, name in [*table.items(), *((key, table[stands_for]) for key, stands_for in synonyms.items())]:
        if key not in fields or (fields[key] is None and key in OPTIONAL):
            continue
        ours[name] = checked(fields[key], type(getattr(of, name)), f"{key} in {source}")
        if name == "activation":
            if ours[name] not in ACTIVATIONS:
                raise LamaError(f"{source} must have {key} among {', '.join(ACTIVATIONS)}; got {quoted(ours[name])}")
            ours[name] = ACTIVATIONS[ours[name]]
    return ours


def renamed(tensors: Mapping[str, StoredTensor], lama_name: Callable[[str], str | None], source: object) -> dict[str, StoredTensor]:
    """A file's tensors under lama's names, the parts of wrappers left out; one for which there is none keeps its own.

    Raises LamaError where two get the same name.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        own = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        key = lama_name(own) or own
        if key in found:
            raise LamaError(f"{source} must hold each tensor once; got {quoted(f'{found[key].name} and {name}', plain=True)}")
        found[key] = tensor
    return found


def without_heads(tensors: Mapping[str, StoredTensor], heads: tuple[str, ...], source: object) -> dict[str, StoredTensor]:
    """The tensors but for those of heads for other tasks, with a warning that names these."""
    if left_out := [tensor.name for name, tensor in tensors.items() if name.startswith(heads)]:
        warn(f"{source}: left out {abbreviated(left_out)}, which belong to heads for other tasks")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)}


def tie(tensors: dict[str, StoredTensor], head: str, body: str, source: object, advice: str = "") -> None:
    """Leave one of two tied tensors, under the name `body`: a file may hold both, or one under either name.

    Raises LamaError where they differ.
    """
    if head not in tensors:
        return
    other = tensors.pop(head)
    kept = tensors.setdefault(body, other)
    if kept is not other and not _equal(kept, other):
        names = quoted(f"{other.name} equal to {kept.name}", plain=True)
        raise LamaError(f"{source} must have {names} in a tied model; got different numbers{advice}")


def abbreviated(names: Sequence[str], spelled: Callable[[str], str] = str, most: int = 4) -> str:
    """Some names, and how many more there are."""
    shown = quoted(", ".join(map(spelled, names[:most])), plain=True)
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Compared by digest, so that only one of them is in memory at a time."""
    return a.shape == b.shape and _digest(a) == _digest(b)


def _digest(tensor: StoredTensor) -> bytes:
    return sha256(read_weights(tensor, "float32").reshape(-1).view(np.uint8).data).digest()
