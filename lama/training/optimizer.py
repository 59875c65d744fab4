"""AdamW, with its state under the parameters' names and all that changes from step to step handed in as one tensor."""

from collections.abc import Mapping

from tinygrad import Tensor

from lama.training.config import TrainingConfig

EPSILON = 1e-8


class AdamW:
    """AdamW with decay on matrices and embeddings, none on biases and norms. Source: Loshchilov & Hutter 2019, algorithm 2.

    m = β₁ m + (1 − β₁) g, v = β₂ v + (1 − β₂) g², w = (1 − r λ) w − r (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig):
        self.parameters, self.config = dict(parameters), config
        self.m, self.v = ({name: Tensor.zeros(*p.shape, device=p.device).contiguous() for name, p in parameters.items()} for _ in "mv")
        Tensor.realize(*self.m.values(), *self.v.values())

    def scalars(self, step: int, rate: float) -> Tensor:
        """What update `step` (from 1) needs: r, 1 − β₁ᵗ, 1 − β₂ᵗ; float32 (3,), realised."""
        device = next(iter(self.parameters.values())).device
        return Tensor([rate, 1 - self.config.beta1**step, 1 - self.config.beta2**step], device=device).realize()

    def update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        """The new parameters, m and v, assigned and not yet realised; every gradient is first multiplied by `scale`."""
        c = self.config
        rate, correction1, correction2 = (scalars[i : i + 1] for i in range(3))
        changed = []
        for name, p in self.parameters.items():
            g = gradients[name] * scale
            m, v = self.m[name], self.v[name]
            m.assign(c.beta1 * m + (1 - c.beta1) * g)
            v.assign(c.beta2 * v + (1 - c.beta2) * g.square())
            step = (m / correction1) / ((v / correction2).sqrt() + EPSILON)
            decay = c.weight_decay if p.ndim >= 2 else 0.0
            p.assign((p - rate * (step + decay * p)).cast(p.dtype))
            changed += [p, m, v]
        return changed

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep: `m.` and `v.` before the parameters' names."""
        return {f"{kind}.{name}": t for kind, tensors in (("m", self.m), ("v", self.v)) for name, t in tensors.items()}
