"""Adapters (LoRA, DoRA) of a GPT: low-rank changes of the linear layers in its blocks, trained on their own.

A name such as `blocks.0.attn.q` means one change. Queries, keys and values have separate changes, though lama
holds their matrices as one. Source: Hu et al. 2021, LoRA; over quantised weights Dettmers et al. 2023, QLoRA;
with magnitudes Liu et al. 2024, DoRA.
"""

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.errors import LamaError, UsageError, abbreviated, quoted
from lama.kernels import Quantized
from lama.kernels.tiles import put_in_tiles, tiles_of
from lama.layers import SMALL, Linear, LowRank
from lama.models.gpt import GPT
from lama.models.quantized import weights_of
from lama.ops import dequantize
from lama.runtime.buffers import from_array, read
from lama.shapes import Array

M = TypeVar("M")
PARTS = ("q", "k", "v", "out", "gate", "up", "down")
PARAMETERS = ("a", "b", "magnitude")
CONSTANTS = ("squares", "known")  # tensors of a change that follow from others
MOST_RANK = 4096


@dataclass(frozen=True)
class Place:
    """A place where a change can be added: some or all outputs of a linear layer."""

    linear: Linear
    part: str
    """One of PARTS."""
    first: int
    """Its first output."""
    d_out: int

    @property
    def d_in(self) -> int:
        return int(self.linear.weight.shape[1])

    @property
    def change(self) -> LowRank | None:
        return self.linear.adapter.get(self.part)


def places(model: GPT) -> dict[str, Place]:
    """All places of a model for changes, by name."""
    found: dict[str, Place] = {}
    for i, block in enumerate(model.blocks):
        ends = np.cumsum([0, *block.attn.widths]).tolist()
        for part, first, last in zip("qkv", ends[:-1], ends[1:], strict=True):
            found[f"blocks.{i}.attn.{part}"] = Place(block.attn.qkv, part, first, last - first)
        layers = {"attn.out": block.attn.out}
        if block.mlp is not None:
            layers |= {f"mlp.{name}": each for name, each in vars(block.mlp).items() if name in PARTS}
        for name, linear in layers.items():
            part, d_out = name.partition(".")[2], int(linear.weight.shape[0])
            found[f"blocks.{i}.{name}"] = Place(linear, part, 0, d_out)
    return found


def matching(model: GPT, patterns: Sequence[str]) -> list[str]:
    """The names of the places that any pattern matches; all names without patterns.

    A pattern is a name, its end such as `q` or `attn.out`, or either with `*`. Raises UsageError for a
    pattern that matches nothing.
    """
    names = list(places(model))
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            rule = f"lora_on must name layers of the model: {known}, or blocks.0.attn.q, blocks.1.*"
            raise UsageError(f"{rule}; got {quoted(pattern)}, which matches none")
    return [name for name in names if not patterns or any(_matches(name, each) for each in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def add_change(place: Place, a: Array, b: Array, scale: float, magnitude: Array | None = None) -> None:
    """Add a change, of matrices a (rank, d_in) and b (d_out, rank), for DoRA with a magnitude (d_out,)."""
    change = LowRank(place.d_in, place.d_out, len(a), scale, place.first)
    change.a, change.b = _tensor(a, place), _tensor(b, place)
    if magnitude is not None:
        norms = norms_of(rows_of(place) + np.float32(scale) * (b @ a))
        change.magnitude, change.known = _tensor(magnitude, place), _tensor(magnitude / norms, place)
    # Sorted by output, whatever the order of the calls.
    changes = {**place.linear.adapter, place.part: change}
    place.linear.adapter = dict(sorted(changes.items(), key=lambda item: item[1].first))


def _tensor(x: Array, place: Place) -> Tensor:
    return from_array(x.astype(np.float32), dtypes.float32, str(place.linear.weight.device))


def add_adapter(
    model: GPT, names: Iterable[str], rank: int, scale: float, seed: int, dora: bool = False
) -> None:
    """Add changes that are still zero: A is uniform in ±1 / √d_in from `seed`, and B is 0, as in PEFT.

    With `dora`, magnitudes start as the norms of the rows, and each step computes the factors again. Raises
    UsageError for a rank above a layer's width.
    """
    rng, found = np.random.default_rng(seed), places(model)
    for name in names:
        place = found[name]
        if rank > (most := min(place.d_in, place.d_out, MOST_RANK)):
            raise UsageError(f"lora must be at most {most}, the width of {name}; got {rank}")
        limit = 1 / math.sqrt(place.d_in)
        a = rng.uniform(-limit, limit, (rank, place.d_in))
        add_change(place, a, np.zeros((place.d_out, rank)), scale)
        if dora and (change := found[name].change) is not None:
            norms = norms_of(rows_of(place))
            change.squares, change.magnitude = _tensor(norms**2, place), _tensor(norms, place)


def remove_adapter(model: GPT) -> None:
    """Remove all changes, which restores the base model."""
    for place in places(model).values():
        place.linear.adapter = {}


def changes_of(model: object) -> dict[str, LowRank]:
    """The changes of a model by the names of their places; empty for a model that is not a GPT."""
    found = places(model) if isinstance(model, GPT) else {}
    return {name: place.change for name, place in found.items() if place.change is not None}


def trained_parameters(model: object) -> dict[str, Tensor]:
    """The parameters that training changes: those of the adapter, or all of a model without one."""
    changes = changes_of(model)
    if not changes:
        return get_state_dict(model)
    found = {(name, part): getattr(each, part) for name, each in changes.items() for part in PARAMETERS}
    return {f"{name}.{part}": p for (name, part), p in found.items() if p is not None}


def constants_of(model: object) -> str:
    """A text that, with the config and the weights' shapes, identifies a model's computation."""
    rounds = [w.rounds for w in weights_of(model).values() if isinstance(w, Quantized)]
    scales = [(name, each.scale, each.known is not None) for name, each in changes_of(model).items()]
    return repr((all(rounds), scales))


def digest_of_base(model: GPT) -> str:
    """The SHA-256 of all weights but the adapter's, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in get_state_dict(model).items():
        if ".adapter." not in name:
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(read(tensor).data)
    return digest.hexdigest()


def rows_of(place: Place) -> Array:
    """The rows of a place's matrix, (d_out, d_in) float32."""
    weight = place.linear.weight
    whole = dequantize(weight) if isinstance(weight, Quantized) else weight
    rows: Array = whole[place.first : place.first + place.d_out].float().numpy()
    return rows


def norms_of(rows: Array) -> Array:
    """The norm of each row, at least SMALL."""
    return np.maximum(np.linalg.norm(rows, axis=1), np.float32(SMALL))


def magnitude_of(place: Place) -> Array:
    """The magnitude of a place's change, (d_out,); without one, the norms of its rows."""
    change = place.change
    if change is None or change.magnitude is None:
        return norms_of(rows_of(place))
    return np.asarray(change.magnitude.numpy())


def merged(place: Place) -> Array:
    """The rows of a place's matrix with its change: W + scale · B A, its rows scaled for DoRA."""
    weight = rows_of(place)
    if (change := place.change) is not None:
        weight = weight + np.float32(change.scale) * (change.b.numpy() @ change.a.numpy())
        if change.magnitude is not None:
            weight *= (change.magnitude.numpy() / norms_of(weight))[:, None]
    return weight


def fold(model: GPT) -> None:
    """Add the changes to the weights, and remove the adapter. Raises LamaError for quantised weights."""
    for linear, found in _by_layer(places(model).values()):
        if not linear.adapter:
            continue
        weight = linear.weight
        if isinstance(weight, Quantized):
            rule = "an adapter can only be folded into weights of a float dtype"
            raise LamaError(f"{rule}; got int{weight.bits}. Load the model as float32")
        whole = Tensor(np.concatenate([merged(place) for place in found]), device=weight.device)
        folded = whole.cast(weight.dtype).contiguous().realize()
        if not np.isfinite(folded.float().numpy()).all():
            wrong = f"the weights with their adapter are not all finite in {weight.dtype.name}"
            raise LamaError(f"{wrong}. Load the model as float32")
        # Another model may share the old weights.
        linear.weight = folded if tiles_of(weight) is None else put_in_tiles(folded)
        linear.adapter = {}


def refuse_adapter(model: object, what: str) -> None:
    """Raise LamaError if the model has an adapter; `what` is the purpose, such as "to be exported"."""
    if changes_of(model):
        raise LamaError(f"a model must have its adapter in its weights {what}; fold it in with lama fuse")


def _by_layer(found: Iterable[Place]) -> list[tuple[Linear, list[Place]]]:
    layers: dict[int, tuple[Linear, list[Place]]] = {}
    for place in found:
        layers.setdefault(id(place.linear), (place.linear, []))[1].append(place)
    return list(layers.values())


def sharing_weights(model: M) -> M:
    """A copy of a model that shares its weights, but can have another adapter."""
    tensors = get_state_dict(model, tensor_type=(Tensor, Quantized)).values()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def size_of(parameters: Mapping[str, Tensor]) -> int:
    """The total number of elements of these parameters."""
    return sum(int(p.numel()) for p in parameters.values())


def described(model: GPT) -> str:
    """One line: `rank 16 on q, k, v: 90 matrices, 1,234,567 parameters`."""
    changes = changes_of(model)
    ranks = sorted({int(each.a.shape[0]) for each in changes.values()})
    parts = dict.fromkeys(name.rpartition(".")[2] for name in changes)
    rank = abbreviated([str(rank) for rank in ranks])
    rank += " (DoRA)" if any(each.magnitude is not None for each in changes.values()) else ""
    count = f"{len(changes)} matrices, {size_of(trained_parameters(model)):,} parameters"
    return f"rank {rank} on {', '.join(parts)}: {count}"
