"""AdamW, with its state under the parameters' names and all that changes from step to step handed in as one tensor."""

from collections.abc import Mapping

import numpy as np
from tinygrad import Tensor

from lama.jit import Input
from lama.kernels import adamw
from lama.training.config import TrainingConfig


class AdamW:
    """AdamW with decay on matrices and embeddings, none on biases and norms. Source: Loshchilov & Hutter 2019, algorithm 2."""

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig):
        self.parameters, self.config = dict(parameters), config
        self.m, self.v = ({name: Tensor.zeros(*p.shape, device=p.device).contiguous() for name, p in parameters.items()} for _ in "mv")
        Tensor.realize(*self.m.values(), *self.v.values())
        self._scalars = Input(str(next(iter(parameters.values())).device))

    def scalars(self, step: int, rate: float) -> Tensor:
        """What update `step` (from 1) needs: r, 1 − β₁ᵗ, 1 − β₂ᵗ; float32 (3,), realised; the next call overwrites it."""
        return self._scalars(np.array([rate, 1 - self.config.beta1**step, 1 - self.config.beta2**step], np.float32))

    def update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        """The new parameters, m and v, assigned and not yet realised; every gradient is first multiplied by `scale`."""
        c = self.config
        changed = []
        for name, p in self.parameters.items():
            decay = c.weight_decay if p.ndim >= 2 else 0.0
            changed += adamw(p, self.m[name], self.v[name], gradients[name], scalars, scale, c.beta1, c.beta2, decay)
        return changed

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep: `m.` and `v.` before the parameters' names."""
        return {f"{kind}.{name}": t for kind, tensors in (("m", self.m), ("v", self.v)) for name, t in tensors.items()}
