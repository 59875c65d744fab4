"""The MLP and the transformer block; every model in lama is a stack of blocks."""

from collections.abc import Callable

from tinygrad import Tensor

from lama.attention import KeysValues, MultiHeadAttention
from lama.cache import LayerCache
from lama.dropout import Dropout, no_dropout
from lama.layers import ACTIVATIONS, LayerNorm, Linear, Norm
from lama.masks import Mask
from lama.ops import add, gated
from lama.runtime.strides import materialise
from lama.shapes import Float
from lama.taps import Tap, no_tap, scoped

NORMS = ("pre", "post", "none")
DECODER_NORMS = (*NORMS, "output", "sandwich")


class MLP:
    """down(activation(up(x))), for each position separately. Source: Vaswani et al. 2017, section 3.3."""

    def __init__(self, d_model: int, d_mlp: int, bias: bool = True, activation: str = "gelu_new"):
        self.up, self.down = Linear(d_model, d_mlp, bias), Linear(d_mlp, d_model, bias)
        self.activation = activation_called(activation)

    def __call__(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        hidden = self.activation(tap("pre", self.up(x)))  # (B, T, d_mlp)
        # Materialised: `down` would compute the activation again for each of its outputs.
        return self.down(tap("post", materialise(hidden)))


class GatedMLP:
    """down(activation(gate(x)) · up(x)), for each position separately. Source: Shazeer 2020."""

    def __init__(self, d_model: int, d_mlp: int, bias: bool = True, activation: str = "silu"):
        self.gate, self.up = Linear(d_model, d_mlp, bias), Linear(d_model, d_mlp, bias)
        self.down = Linear(d_mlp, d_model, bias)
        self.activation = activation_called(activation)

    def __call__(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        gate, up = tap("pre", self.gate(x)), tap("pre_linear", self.up(x))  # (B, T, d_mlp) each
        return self.down(tap("post", gated(gate, up, self.activation)))


def activation_called(name: str) -> Callable[[Tensor], Tensor]:
    """An entry of ACTIVATIONS. Raises ValueError."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]


def make_norm(d_model: int, bias: bool = True, epsilon: float = 1e-5, order: str = "pre") -> LayerNorm | None:
    """The norm of a sub-layer; None for order="none"."""
    return None if order == "none" else LayerNorm(d_model, bias, epsilon)


def make_mlp(
    d_model: int, d_mlp: int, bias: bool = True, activation: str = "gelu_new", gated: bool = False
) -> MLP | GatedMLP | None:
    """The MLP of a block; None for d_mlp=0."""
    if not d_mlp:
        return None
    return (GatedMLP if gated else MLP)(d_model, d_mlp, bias, activation)


class Block:
    """Attention, then an MLP, each added to the residual stream x.

    order="pre" (GPT-2, Llama):          x + f(norm(x))
    order="post" (Vaswani et al. 2017):  norm(x + f(x))
    order="none":                        x + f(x)
    order="output" (OLMo 2):             x + norm(f(x))
    order="sandwich" (Gemma 2):          x + norm_post(f(norm(x)))

    With parallel=True, for order="pre", both read the same x: x + attn(norm1(x)) + mlp(norm2(x)). Without
    norm2 (GPT-J), the MLP reads norm1(x) too. With `cross_attn`, attention to `memory` comes between the two.
    With residual=False nothing is added, which shows the purpose of the stream. `attention_dropout`: whether
    training also drops entries of the attention patterns, which the 2017 paper does not.
    """

    def __init__(
        self,
        attn: MultiHeadAttention,
        mlp: MLP | GatedMLP | None,
        norm1: Norm | None,
        norm2: Norm | None,
        order: str = "pre",
        cross_attn: MultiHeadAttention | None = None,
        norm_cross: Norm | None = None,
        attention_dropout: bool = True,
        residual: bool = True,
        parallel: bool = False,
        norm1_post: Norm | None = None,
        norm2_post: Norm | None = None,
    ):
        if order not in DECODER_NORMS:
            raise ValueError(f"order must be one of {', '.join(DECODER_NORMS)}; got {order!r}")
        self.order, self.residual, self.attention_dropout = order, residual, attention_dropout
        self.ln1, self.attn, self.ln1_post = norm1, attn, norm1_post
        self.ln_cross, self.cross_attn = norm_cross, cross_attn
        self.ln2, self.mlp, self.ln2_post = norm2, mlp, norm2_post
        self.parallel = parallel

    def __call__(
        self,
        x: Float[Tensor, "B T d_model"],
        mask: Mask | None = None,
        memory: Float[Tensor, "B S d_model"] | KeysValues | None = None,
        memory_mask: Mask | None = None,
        cache: LayerCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """`memory`: the encoder's output, or `cross_attn.keys_values` of it.

        Raises ValueError if a block with `cross_attn` does not get it, or one without does.
        """
        has_cross = self.cross_attn is not None
        if (memory is not None) != has_cross:
            rule = "memory must be given to blocks with cross-attention, and only to those"
            raise ValueError(f"{rule}; got cross={has_cross}")
        pattern_dropout = dropout if self.attention_dropout else no_dropout

        # The parts of the formula, each with its taps and dropout.
        def plus(x: Tensor, h: Tensor) -> Tensor:
            return add(x, h) if self.residual else h

        def norm(name: str, x: Tensor) -> Tensor:
            layer: Norm | None = getattr(self, name)
            y = x if layer is None else layer(x)
            return y if self.order in ("post", "none") else tap(f"{name}.normalized", y)

        def attn(x: Tensor) -> Tensor:
            return self.attn(x, mask, None, cache, scoped(tap, "attn"), pattern_dropout.scoped("attn"))

        def cross_attn(x: Tensor) -> Tensor:
            assert self.cross_attn is not None
            inner_tap, inner_dropout = scoped(tap, "cross_attn"), pattern_dropout.scoped("cross_attn")
            return self.cross_attn(x, memory_mask, memory, None, inner_tap, inner_dropout)

        def mlp(x: Tensor) -> Tensor:
            assert self.mlp is not None
            return self.mlp(x, scoped(tap, "mlp"))

        def out(name: str, h: Tensor) -> Tensor:
            return dropout(f"{name}_out", tap(f"{name}_out", h))

        def added(x: Tensor, name: str, part: str, f: Callable[[Tensor], Tensor]) -> Tensor:
            match self.order:
                case "pre":
                    return plus(x, out(part, f(norm(name, x))))
                case "output":
                    return plus(x, out(part, norm(name, f(x))))
                case "sandwich":
                    return plus(x, out(part, norm(f"{name}_post", f(norm(name, x)))))
            return norm(name, plus(x, out(part, f(x))))  # post; or none, where norm(x) is x

        x = tap("resid_pre", x)
        if self.parallel and self.mlp is not None:
            y = norm("ln1", x)
            h = out("attn", attn(y))
            return tap(
                "resid_post", plus(plus(x, h), out("mlp", mlp(y if self.ln2 is None else norm("ln2", x))))
            )
        x = tap("resid_mid", added(x, "ln1", "attn", attn))
        if self.cross_attn is not None:
            x = tap("resid_cross", added(x, "ln_cross", "cross_attn", cross_attn))
        if self.mlp is not None:
            x = added(x, "ln2", "mlp", mlp)
        return tap("resid_post", x)
