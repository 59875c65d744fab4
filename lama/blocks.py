"""The MLP and the transformer block: what every model in lama is a stack of."""

from tinygrad import Tensor

from lama.attention import KeysValues, MultiHeadAttention
from lama.cache import LayerCache
from lama.dropout import Dropout, no_dropout
from lama.layers import ACTIVATIONS, LayerNorm, Linear
from lama.masks import Mask
from lama.ops import add
from lama.runtime.strides import materialise
from lama.shapes import Float
from lama.taps import Tap, no_tap, scoped

NORMS = ("pre", "post", "none")


class MLP:
    """down(activation(up(x))), at each position alone. Source: Vaswani et al. 2017, section 3.3."""

    def __init__(self, d_model: int, d_mlp: int, bias: bool = True, activation: str = "gelu_new"):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.up, self.down = Linear(d_model, d_mlp, bias), Linear(d_mlp, d_model, bias)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        hidden = self.activation(tap("pre", self.up(x)))  # (B, T, d_mlp)
        # Materialised: `down` would compute the activation again for each of its outputs.
        return self.down(tap("post", materialise(hidden)))


def make_norm(d_model: int, bias: bool = True, epsilon: float = 1e-5, order: str = "pre") -> LayerNorm | None:
    """The norm of a sub-layer; None for order="none"."""
    return None if order == "none" else LayerNorm(d_model, bias, epsilon)


def make_mlp(d_model: int, d_mlp: int, bias: bool = True, activation: str = "gelu_new") -> MLP | None:
    """The MLP of a block; None for d_mlp=0."""
    return MLP(d_model, d_mlp, bias, activation) if d_mlp else None


class Block:
    """Attention, then an MLP, each added to the residual stream x.

    order="pre" (GPT-2):                 x + f(norm(x))
    order="post" (Vaswani et al. 2017):  norm(x + f(x))
    order="none":                        x + f(x)

    With `cross_attn`, attention to `memory` comes between the two. With residual=False nothing is added, to
    show the purpose of the stream. `attention_dropout`: whether training also drops entries of the attention
    patterns, which the 2017 paper does not.
    """

    def __init__(
        self,
        attn: MultiHeadAttention,
        mlp: MLP | None,
        norm1: LayerNorm | None,
        norm2: LayerNorm | None,
        order: str = "pre",
        cross_attn: MultiHeadAttention | None = None,
        norm_cross: LayerNorm | None = None,
        attention_dropout: bool = True,
        residual: bool = True,
    ):
        if order not in NORMS:
            raise ValueError(f"order must be one of {', '.join(NORMS)}; got {order!r}")
        self.order, self.residual, self.attention_dropout = order, residual, attention_dropout
        self.ln1, self.attn = norm1, attn
        self.ln_cross, self.cross_attn = norm_cross, cross_attn
        self.ln2, self.mlp = norm2, mlp

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

        Raises ValueError if it is given to a block without `cross_attn`, or not to one with it.
        """
        has_cross = self.cross_attn is not None
        if (memory is not None) != has_cross:
            rule = "memory must be given exactly to blocks with cross-attention"
            raise ValueError(f"{rule}; got cross={has_cross}")
        pattern_dropout = dropout if self.attention_dropout else no_dropout

        # The parts of the formula, each with its taps and dropout.
        def plus(x: Tensor, h: Tensor) -> Tensor:
            return add(x, h) if self.residual else h

        def norm(name: str, x: Tensor) -> Tensor:
            layer: LayerNorm | None = getattr(self, name)
            y = x if layer is None else layer(x)
            return tap(f"{name}.normalized", y) if self.order == "pre" else y

        def attn(x: Tensor) -> Tensor:
            h = self.attn(x, mask, None, cache, scoped(tap, "attn"), pattern_dropout.scoped("attn"))
            return dropout("attn_out", tap("attn_out", h))

        def cross_attn(x: Tensor) -> Tensor:
            assert self.cross_attn is not None
            inner_tap, inner_dropout = scoped(tap, "cross_attn"), pattern_dropout.scoped("cross_attn")
            h = self.cross_attn(x, memory_mask, memory, None, inner_tap, inner_dropout)
            return dropout("cross_attn_out", tap("cross_attn_out", h))

        def mlp(x: Tensor) -> Tensor:
            assert self.mlp is not None
            return dropout("mlp_out", tap("mlp_out", self.mlp(x, scoped(tap, "mlp"))))

        x = tap("resid_pre", x)
        if self.order == "pre":
            x = tap("resid_mid", plus(x, attn(norm("ln1", x))))
            if self.cross_attn is not None:
                x = tap("resid_cross", plus(x, cross_attn(norm("ln_cross", x))))
            if self.mlp is not None:
                x = plus(x, mlp(norm("ln2", x)))
        else:
            x = tap("resid_mid", norm("ln1", plus(x, attn(x))))
            if self.cross_attn is not None:
                x = tap("resid_cross", norm("ln_cross", plus(x, cross_attn(x))))
            if self.mlp is not None:
                x = norm("ln2", plus(x, mlp(x)))
        return tap("resid_post", x)
