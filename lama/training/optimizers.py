"""Optimizers by name. Each updates every parameter of a model; its state goes into checkpoints."""

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.fill import DTYPES
from lama.errors import UsageError
from lama.kernels import matmul_precision
from lama.ops import adamw, muon_directions, muon_step, orthogonalise
from lama.runtime.buffers import zeros
from lama.runtime.capture import InputBuffer
from lama.training.settings.base import TrainingConfig

Rows = Mapping[str, Sequence[int]]
"""For each parameter that joins several matrices, by its name: the numbers of their rows."""


@runtime_checkable
class Optimizer(Protocol):
    """An update rule. All updates are one captured step: the numbers that change are passed as `scalars`."""

    state_per_weight: tuple[int, int]
    """Numbers of state for each weight of the blocks' matrices, and of the other parameters."""

    def scalars(self, step: int, rate: float) -> Tensor:
        """The numbers that update `step` (from 1) at this learning rate needs: float32, realised."""

    def update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        """Assign the new parameters and state, unrealised; gradients are first multiplied by `scale`."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must save, by name."""

    def rows_of_state(self) -> dict[str, list[tuple[str, int]]]:
        """For each tensor of the state, the parameters that its rows belong to, and how many rows each."""


class AdamW:
    """AdamW, with decay on matrices and embeddings, none on biases and norms.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """

    state_per_weight = 2, 2

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig, rows: Rows | None = None):
        """`rows` is not used: AdamW updates each number separately."""
        self.parameters, self.config = dict(parameters), config
        self.m, self.v = zeros_like_all(parameters), zeros_like_all(parameters)
        self._scalars = InputBuffer(str(next(iter(parameters.values())).device) if parameters else None)

    def scalars(self, step: int, rate: float) -> Tensor:
        """r, 1 − β₁ᵗ and 1 − β₂ᵗ of update `step`: float32 (3,), overwritten by the next call."""
        c = self.config
        return self._scalars(np.array([rate, 1 - c.beta1**step, 1 - c.beta2**step], np.float32))

    def update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        c, changed = self.config, []
        for name, p in self.parameters.items():
            m, v, decay = self.m[name], self.v[name], c.weight_decay if p.ndim >= 2 else 0.0
            g, factor = gradients[name], rate_factor(name, p, c)
            changed += adamw(p, m, v, g, scalars, scale, c.beta1, c.beta2, decay, factor=factor)
        return changed

    def state(self) -> dict[str, Tensor]:
        first = {f"m.{name}": t for name, t in self.m.items()}
        return first | {f"v.{name}": t for name, t in self.v.items()}

    def rows_of_state(self) -> dict[str, list[tuple[str, int]]]:
        return {f"{kind}.{name}": [(name, int(t.shape[0]))] for kind in "mv" for name, t in self.m.items()}


class Muon:
    """Muon for the matrices of the blocks, AdamW for embeddings, the output layer and vectors.

    Muon's step is the momentum with all its singular values moved close to 1, times √(d_out / d_in) for tall
    matrices. Queries, keys and values are three matrices. Matrices of one shape are stacked, so that one
    kernel multiplies them all; with `precision` bfloat16 it rounds them, as the source does. Source: Jordan
    et al. 2024, https://kellerjordan.github.io/posts/muon/; for the decay Liu et al. 2025 (Moonlight),
    section 2.2.
    """

    state_per_weight = 1, 2

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig, rows: Rows | None = None):
        """`rows` are those of `joined_rows`. Raises UsageError for a model without matrices in blocks."""
        self.config = config
        self.matrices = {name: p for name, p in parameters.items() if is_hidden_matrix(name, p)}
        if not self.matrices:
            raise UsageError("optimizer muon needs matrices in blocks; got a model without. Use adamw")
        rest = {name: p for name, p in parameters.items() if name not in self.matrices}
        self.adamw = AdamW(rest, config)
        self.scalars = self.adamw.scalars
        self.runs: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        """For each shape, its matrices: a parameter, their first row in it, and their number."""
        for name, p in self.matrices.items():
            first = 0
            for height, same in groupby((rows or {}).get(name, [int(p.shape[0])])):
                count = len(list(same))
                self.runs.setdefault((height, int(p.shape[1])), []).append((name, first, count))
                first += count * height
        new = partial(zeros, dtype=dtypes.float32, device=str(next(iter(self.matrices.values())).device))
        self.momenta = {
            shape: new(sum(count for _, _, count in runs), *shape) for shape, runs in self.runs.items()
        }

    def update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        with matmul_precision(DTYPES[self.config.precision]):
            return self._update(gradients, scalars, scale)

    def _update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        c, now = self.config, dict(self.matrices)
        changed = self.adamw.update(gradients, scalars, scale) if self.adamw.parameters else []
        for shape, runs in self.runs.items():
            names = list(dict.fromkeys(name for name, _, _ in runs))
            places = [(names.index(name), first, count) for name, first, count in runs]
            found = [gradients[name] for name in names]
            x, momentum = muon_directions(found, places, self.momenta[shape], scale, c.momentum)
            factor = rate_factor(names[0], now[names[0]], c)
            step, decay = factor * max(1.0, shape[0] / shape[1]) ** 0.5, factor * c.weight_decay
            parts = [now[name] for name in names]
            new = muon_step(parts, places, orthogonalise(x), scalars, step, decay)
            # One parameter may hold matrices of two shapes, such as queries and keys: both updates apply.
            now |= zip(names, new, strict=True)
            changed.append(momentum)
        return [*changed, *now.values()]

    def state(self) -> dict[str, Tensor]:
        momenta = {_momentum(shape): t for shape, t in self.momenta.items()}
        return momenta | self.adamw.state()

    def rows_of_state(self) -> dict[str, list[tuple[str, int]]]:
        found = {_momentum(shape): [(name, n) for name, _, n in runs] for shape, runs in self.runs.items()}
        return found | self.adamw.rows_of_state()


OPTIMIZERS: dict[str, type[AdamW] | type[Muon]] = {"adamw": AdamW, "muon": Muon}


def _momentum(shape: tuple[int, int]) -> str:
    """The name of the momenta of all matrices of a shape."""
    return f"momentum.{shape[0]}x{shape[1]}"


def make_optimizer(
    parameters: Mapping[str, Tensor], config: TrainingConfig, rows: Rows, share: bool = False
) -> Optimizer:
    """The optimizer of the settings; for a `share` of the parameters without hidden matrices, AdamW."""
    if share and not any(is_hidden_matrix(name, p) for name, p in parameters.items()):
        return AdamW(parameters, config)
    return OPTIMIZERS[config.optimizer](parameters, config, rows)


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix of a block."""
    return "blocks" in name.split(".") and p.ndim == 2


def rate_factor(name: str, p: Tensor, config: TrainingConfig) -> float:
    """The learning rate of a parameter, divided by `learning_rate`."""
    if is_hidden_matrix(name, p):
        return config.rate_factor("matrix")
    if "unembed" in name:
        return config.rate_factor("head")
    return config.rate_factor("embedding") if "embed" in name else 1.0


def joined_rows(model: Any) -> Rows:
    """The numbers of rows of queries, keys and values in each matrix `qkv` of a model."""
    found = {}
    for name in get_state_dict(model):
        if name.endswith(".qkv.weight"):
            path = name.removesuffix(".qkv.weight").split(".")
            found[name] = reduce(part_of, path, model).widths
    return found


def part_of(module: Any, key: str) -> Any:
    """The attribute or the item called `key`, which is a part of a parameter's name."""
    return module[int(key)] if key.isdigit() else getattr(module, key)


def zeros_like_all(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A realised buffer of zeros for each parameter, of its shape and on its device."""
    new = partial(zeros, dtype=dtypes.float32)
    return {name: new(*map(int, p.shape), device=str(p.device)) for name, p in parameters.items()}
