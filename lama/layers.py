"""The parametrised layers of all models, the activations, and the initial weights."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.kernels import Quantized
from lama.ops import add, gelu, layernorm, matmul, rmsnorm
from lama.runtime.buffers import empty
from lama.runtime.device import open_device
from lama.shapes import Float

SMALL = 1e-15  # the least norm of a row: a row of zeros has this one
_open_once = functools.cache(open_device)


def parameter(*shape: int) -> Tensor:
    """An unfilled float32 parameter of this shape: `initialise` or a checkpoint fills it."""
    _open_once()  # before the first tensor opens tinygrad's own choice
    return empty(*shape)


def linear(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"] | Quantized, bias: Tensor | None = None
) -> Float[Tensor, "... d_out"]:
    """x Wᵀ + b."""
    return matmul(x, weight, transpose_b=True, bias=bias)


class LowRank:
    """scale · x Aᵀ Bᵀ, added to some or all outputs of a `Linear`. Source: Hu et al. 2021, LoRA, section 4.1.

    A has the shape (rank, d_in), B (d_out, rank). It changes the layer's d_out outputs from `first` on. With
    a `magnitude` (DoRA), the changed outputs, without bias, are then multiplied by `factors`.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, first: int = 0):
        self.a, self.b = parameter(rank, d_in), parameter(d_out, rank)
        self.scale, self.first = scale, first
        self.magnitude: Tensor | None = None
        """The norm that each row of W + scale · B A is scaled to: (d_out,)."""
        self.squares: Tensor | None = None
        """In training, the sum of squares of each row of W: (d_out,)."""
        self.known: Tensor | None = None
        """The factors, if they are constant, as after training."""

    def __call__(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return linear((linear(x, self.a) * self.scale).contiguous(), self.b)

    def factors(self, products: Float[Tensor, "rank d_layer"] | None) -> Float[Tensor, "d_out"] | None:
        """magnitude / ‖W + scale · B A‖ for each row; None without a magnitude.

        `products` is A Wᵀ for the whole layer, or None if the factors are `known`. Gradients treat the norm
        as a constant. W is only multiplied by A's rows, so that a quantised W is not dequantised. Source: Liu
        et al. 2024, DoRA, equation 5 and section 4.3.
        """
        if products is None or self.magnitude is None or self.squares is None:
            return self.known
        with_a = products[:, self.first : self.first + int(self.b.shape[0])]  # (rank, d_out)
        change = linear(self.b, linear(self.a, self.a))  # (d_out, rank)
        mixed = ((2 * self.scale) * with_a.T + self.scale**2 * change) * self.b
        norm = (self.squares + mixed.sum(1)).maximum(SMALL**2).sqrt()
        return self.magnitude / norm.contiguous().detach()


class Linear:
    """y = x Wᵀ + b, with a weight of shape (d_out, d_in); an adapter adds to it, and DoRA scales it."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True):
        self.weight: Tensor | Quantized = parameter(d_out, d_in)
        self.bias = parameter(d_out) if bias else None
        self.adapter: dict[str, LowRank] = {}
        """The low-rank changes of its parts, such as q, k and v, by name."""

    def __call__(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        if not self.adapter:
            return linear(x, self.weight, self.bias)
        if (factors := self._factors()) is None:
            return add(linear(x, self.weight, self.bias), self._change(x))
        y = add(linear(x, self.weight), self._change(x)) * factors
        return y if self.bias is None else y + self.bias

    def _factors(self) -> Float[Tensor, "d_out"] | None:
        """The factors of all outputs, 1 where a part has none; None where no part has any."""
        d_out, parts, found = int(self.weight.shape[0]), list(self.adapter.values()), []
        products: Sequence[Tensor | None] = [None for _ in parts]
        if any(part.squares is not None for part in parts):  # one product for q, k and v reads W once
            rows = parts[0].a.cat(*(part.a for part in parts[1:]))
            products = linear(rows, self.weight).split([int(part.a.shape[0]) for part in parts])
        for part, of_part in zip(parts, products, strict=True):
            if (own := part.factors(of_part)) is not None:
                found.append(own.pad((part.first, d_out - part.first - int(own.shape[0])), value=1.0))
        return math.prod(found[1:], start=found[0]) if found else None

    def _change(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """The sum of all low-rank changes; outputs without one get 0."""
        d_out, changes = int(self.weight.shape[0]), []
        for part in self.adapter.values():
            z, rest = part(x), d_out - part.first - int(part.b.shape[0])
            changes.append(z.pad((*[None] * (z.ndim - 1), (part.first, rest))) if part.first or rest else z)
        return sum(changes[1:], changes[0])


class LayerNorm:
    """y = (x − mean(x)) / √(var(x) + ε) · w + b over the last axis. Source: Ba et al. 2016, eq. 4."""

    def __init__(self, d_model: int, bias: bool = True, epsilon: float = 1e-5, weight: bool = True):
        self.weight = parameter(d_model) if weight else None
        self.bias = parameter(d_model) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return layernorm(x, self.weight, self.bias, self.epsilon)


class RMSNorm:
    """y = x / √(mean(x²) + ε) · w over the last axis. Source: Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, d_model: int, epsilon: float = 1e-5, weight: bool = True):
        self.weight = parameter(d_model) if weight else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return rmsnorm(x, self.weight, self.epsilon)


Norm = LayerNorm | RMSNorm
NORM_KINDS = ("layer", "rms")


def new_norm(
    d: int, kind: str = "layer", weight: bool = True, bias: bool = True, epsilon: float = 1e-5
) -> Norm:
    """A norm of `d` numbers, of a kind of NORM_KINDS; without a weight, it has no bias either."""
    if kind == "rms":
        return RMSNorm(d, epsilon, weight)
    return LayerNorm(d, bias and weight, epsilon, weight)


def gelu_exact(x: Tensor) -> Tensor:
    """x · Φ(x), with the error function. Source: Hendrycks & Gimpel 2016."""
    return x * 0.5 * (1.0 + (x / math.sqrt(2.0)).erf())


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation, as in GPT-2 (`gelu_new` in Hugging Face configs)."""
    return gelu(x)


def gelu_quick(x: Tensor) -> Tensor:
    """x · σ(1.702 x), GELU's sigmoid approximation. Source: Hendrycks & Gimpel 2016, section 2."""
    return x * (1.702 * x).sigmoid()


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)². Source: So et al. 2021 (Primer), section 4.2."""
    return x.relu().square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu_tanh,
    "gelu": gelu_exact,
    "relu": Tensor.relu,
    "silu": Tensor.silu,
    "tanh": Tensor.tanh,
    "quick_gelu": gelu_quick,
    "relu2": relu_squared,
}


def initialise(module: object, seed: int, n_layers: int = 0, std: float = 0.02) -> None:
    """Fill a module's parameters in place as GPT-2 did: matrices N(0, std), biases 0, norm weights 1.

    With `n_layers`, the projections that write into the residual stream (`out` and `down`) are √(2·n_layers)
    times smaller, so that its variance does not grow with depth. Source: GPT-2 paper, section 2.3. The
    numbers come from numpy, one stream per `seed`, in the order of the state dict, on every device.
    """
    rng = np.random.default_rng(seed)
    parameters = get_state_dict(module)
    for name, tensor in parameters.items():
        shape = tensor.shape
        if name.endswith("bias"):
            value = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            value = np.ones(shape, np.float32)
        else:
            writes_residual = n_layers and name.endswith(("out.weight", "down.weight"))
            scale = std / math.sqrt(2 * n_layers) if writes_residual else std
            value = rng.standard_normal(shape, np.float32) * np.float32(scale)
        tensor.assign(Tensor(value, dtype=tensor.dtype, device=tensor.device))
    Tensor.realize(*parameters.values())


def initialise_by_width(module: object, seed: int) -> None:
    """Fill a GPT's parameters in place so that activations are of the same magnitude at every width.

    Matrices of blocks are N(0, 1 / (4 d_in)); biases and projections that write into the residual stream
    start at 0. An untied unembedding starts at 0, and the token embedding is then N(0, 0.25); other
    embeddings are GPT-2's N(0, 0.02²). Norm weights are 1. Source: nanochat, gpt.py, `init_weights`, with
    half of its standard deviations.
    """
    rng = np.random.default_rng(seed)
    parameters = get_state_dict(module)
    for name, tensor in parameters.items():
        shape = tuple(map(int, tensor.shape))
        std = 0.5 / math.sqrt(shape[-1])
        if name.endswith(("out.weight", "down.weight", "bias")) or name == "unembed.weight":
            std = 0.0
        elif "embed" in name:
            std = 0.5 if name == "embed.weight" and "unembed.weight" in parameters else 0.02
        value = rng.standard_normal(shape, np.float32) * np.float32(std)
        value = value if len(shape) > 1 or std == 0 else np.ones(shape, np.float32)
        tensor.assign(Tensor(value, dtype=tensor.dtype, device=tensor.device))
    Tensor.realize(*parameters.values())
