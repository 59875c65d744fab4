"""The MLP and the transformer block: what every model in lama is a stack of."""

from tinygrad import Tensor

from lama.attention import KeysValues, MultiHeadAttention
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.kernels import add, stored
from lama.layers import ACTIVATIONS, LayerNorm, Linear
from lama.masks import Mask
from lama.shapes import Float, Size
from lama.taps import Tap, no_tap, scoped

NORMS = ("pre", "post", "none")


class MLP:
    """down(activation(up(x))), the same for each position on its own. Source: Vaswani et al. 2017, section 3.3."""

    def __init__(self, d_model: int, d_mlp: int, bias: bool = True, activation: str = "gelu_new"):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.up, self.down = Linear(d_model, d_mlp, bias), Linear(d_mlp, d_model, bias)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        hidden = self.activation(tap("pre", self.up(x)))  # (B, T, d_mlp)
        # Stored, not left lazy: `down` would compute the activation again for each of its outputs.
        return self.down(tap("post", stored(hidden)))


class Block:
    """Attention, then an MLP, each added to the residual stream x; with `cross`, attention to `memory` between them.

    norm="pre" (GPT-2):                x + f(norm(x))
    norm="post" (Vaswani et al. 2017): norm(x + f(x))
    norm="none":                       x + f(x)
    With residual=False nothing is added: f alone, to see what the stream is for. With d_mlp=0 there is no MLP.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_mlp: int,
        bias: bool = True,
        activation: str = "gelu_new",
        norm: str = "pre",
        norm_epsilon: float = 1e-5,
        similarity: str = "scaled_dot",
        cross: bool = False,
        attention_dropout: bool = True,
        residual: bool = True,
        divisor: float = 1.0,
    ):
        """`attention_dropout`: whether training drops entries of the attention patterns too, which the 2017 paper does not.

        `divisor`: the scores of self-attention are divided by it, beside the similarity's own scale.
        """
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
        self.norm, self.residual, self.attention_dropout = norm, residual, attention_dropout

        def layer_norm() -> LayerNorm | None:
            return None if norm == "none" else LayerNorm(d_model, bias, norm_epsilon)

        self.ln1, self.attn = layer_norm(), MultiHeadAttention(d_model, n_heads, bias, similarity, divisor)
        self.ln_cross = layer_norm() if cross else None
        self.cross_attn = MultiHeadAttention(d_model, n_heads, bias, similarity) if cross else None
        self.ln2 = layer_norm() if d_mlp else None
        self.mlp = MLP(d_model, d_mlp, bias, activation) if d_mlp else None

    def __call__(
        self,
        x: Float[Tensor, "B T d_model"],
        mask: Mask | None = None,
        memory: Float[Tensor, "B S d_model"] | KeysValues | None = None,
        memory_mask: Mask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        position: Size = 0,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """`memory` is the encoder's output, or `cross_attn.keys_values` of it; a block made with `cross` needs it. Raises ValueError."""
        if (memory is None) != (self.cross_attn is None):
            raise ValueError(f"memory must be given exactly to blocks with cross-attention; got cross={self.cross_attn is not None}")
        x = tap("resid_pre", x)
        taps, drops = scoped(tap, "attn"), self._in_attention(dropout, "attn")
        h = self.attn(self._norm_before(self.ln1, "ln1", x, tap), mask, None, cache, layer, position, taps, drops)
        x = tap("resid_mid", self._add(self.ln1, x, dropout("attn_out", tap("attn_out", h))))
        if self.cross_attn is not None:
            taps, drops = scoped(tap, "cross_attn"), self._in_attention(dropout, "cross_attn")
            h = self.cross_attn(self._norm_before(self.ln_cross, "ln_cross", x, tap), memory_mask, memory, tap=taps, dropout=drops)
            x = tap("resid_cross", self._add(self.ln_cross, x, dropout("cross_attn_out", tap("cross_attn_out", h))))
        if self.mlp is None:
            return tap("resid_post", x)
        h = self.mlp(self._norm_before(self.ln2, "ln2", x, tap), scoped(tap, "mlp"))
        return tap("resid_post", self._add(self.ln2, x, dropout("mlp_out", tap("mlp_out", h))))

    def _in_attention(self, dropout: Dropout, scope: str) -> Dropout:
        return dropout.scoped(scope) if self.attention_dropout else no_dropout

    def _norm_before(self, norm: LayerNorm | None, name: str, x: Tensor, tap: Tap) -> Tensor:
        return tap(f"{name}.normalized", norm(x)) if norm is not None and self.norm == "pre" else x

    def _add(self, norm: LayerNorm | None, x: Tensor, h: Tensor) -> Tensor:
        x = add(x, h) if self.residual else h
        return norm(x) if norm is not None and self.norm == "post" else x
