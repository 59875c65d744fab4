"""BERT: an encoder whose tokens see both directions, with a head for masked tokens or one for classes."""

import math
from dataclasses import dataclass

from tinygrad import Tensor

from lama.attention import MultiHeadAttention
from lama.blocks import Block, make_mlp, make_norm
from lama.dropout import Dropout, no_dropout
from lama.embeddings import TokenEmbedding, make_positions
from lama.errors import quoted
from lama.layers import ACTIVATIONS, LayerNorm, Linear, initialise, linear, parameter
from lama.masks import padding_mask
from lama.models.config import check_config, check_length
from lama.models.protocol import AttentionSite, attention_site
from lama.ops import embedding
from lama.shapes import Float, Int
from lama.taps import Tap, no_tap, scoped

POOLINGS = ("mean", "first")


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder. The defaults are BERT's base model, uncased."""

    vocab_size: int = 30522
    """Tokens in the vocabulary."""
    context_length: int = 512
    """The most tokens of a row."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Number of blocks."""
    n_heads: int = 12
    """Heads in a block; each is d_model / n_heads wide."""
    d_mlp: int = 0
    """Hidden width of the MLP; 0 means 4 · d_model."""
    bias: bool = True
    """Whether linear layers and norms have biases."""
    activation: str = "gelu"
    """gelu (exact), gelu_new (tanh), relu, silu, tanh or quick_gelu."""
    norm: str = "post"
    """The place of the norms: post (BERT) or pre (GPT-2)."""
    norm_epsilon: float = 1e-12
    """ε in the norms."""
    positions: str = "learned"
    """learned or sinusoidal."""
    segments: int = 2
    """The number of kinds of segments, each with an embedding that is added to its tokens; 0 for none."""
    pad: int = 0
    """The token that pads short rows; attention ignores it."""
    mask: int = 103
    """The token that replaces a token to be predicted."""

    def __post_init__(self) -> None:
        check_config(self)
        for name in ("pad", "mask"):
            token = getattr(self, name)
            if not 0 <= token < self.vocab_size:
                got = f"{name}={token}, vocab_size={self.vocab_size}"
                raise ValueError(f"{name} must be a token of the vocabulary; got {got}")
        if self.segments < 0:
            raise ValueError(f"segments must be at least 0; got segments={self.segments}")


@dataclass(frozen=True)
class ClassifierConfig(BertConfig):
    """The shape of an encoder, and the classes that its head scores."""

    labels: tuple[str, ...] = ("0", "1")
    """The names of the classes."""
    pooling: str = "mean"
    """The head's input: the mean over all tokens that are not padding, or the first token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = {label for label in self.labels if type(label) is str}
        if len(names) < max(2, len(self.labels)):
            got = quoted(", ".join(map(str, self.labels)), plain=True)
            raise ValueError(f"labels must be two or more different names; got {got}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {quoted(self.pooling)}")


def make_block(c: BertConfig) -> Block:
    """One of the encoder's blocks."""
    return Block(
        attn=MultiHeadAttention(c.d_model, c.n_heads, c.bias),
        mlp=make_mlp(c.d_model, c.d_mlp, c.bias, c.activation),
        norm1=make_norm(c.d_model, c.bias, c.norm_epsilon, c.norm),
        norm2=make_norm(c.d_model, c.bias, c.norm_epsilon, c.norm),
        order=c.norm,
    )


class Encoder:
    """Embed tokens, positions and segments, normalise, run the blocks; padding is hidden from all positions.

    Source: Devlin et al. 2018, section 3. With norm="pre", the norm follows the last block instead.
    """

    def __init__(self, config: BertConfig):
        c = self.config = config
        self.embed = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_embed = make_positions(c.positions, c.context_length, c.d_model)
        self.segment_embed = TokenEmbedding(c.segments, c.d_model) if c.segments else None
        self.ln_embed = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "post" else None
        self.blocks = [make_block(c) for _ in range(c.n_layers)]
        self.ln_final = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "pre" else None

    def __call__(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """The residual stream after the last block. Without `segments` all tokens are in segment 0.

        Raises ValueError for more than `context_length` tokens, and for segments if the model has none.
        """
        T, device = int(tokens.shape[1]), self.embed.weight.device
        tokens = tokens.to(device)
        check_length(T, self.config)
        if segments is not None and self.segment_embed is None:
            got = f"segments of shape {tuple(segments.shape)}"
            raise ValueError(f"segments must be left out for a model without them; got {got}")
        x = tap("embed", self.embed(tokens))  # (B, T, d_model)
        x = x + tap("pos_embed", self.pos_embed(T).to(device))
        if self.segment_embed is not None:
            kinds = tokens.zeros_like() if segments is None else segments.to(device)
            x = x + tap("segment_embed", self.segment_embed(kinds.contiguous()))
        if self.ln_embed is not None:
            x = tap("ln_embed.normalized", self.ln_embed(x))
        x = dropout("embed", x)
        mask = padding_mask(tokens, self.config.pad)
        for i, block in enumerate(self.blocks):
            site = f"blocks.{i}"
            x = block(x, mask, tap=scoped(tap, site), dropout=dropout.scoped(site))
        return x if self.ln_final is None else tap("ln_final.normalized", self.ln_final(x))


class Bert:
    """An encoder whose head scores every token for each position: norm(act(dense(x))) Eᵀ + b.

    Source: Devlin et al. 2018, section 3.1, and google-research/bert, `get_masked_lm_output`.
    """

    def __init__(self, config: BertConfig, seed: int | None = 0):
        """`seed` is as in `GPT`."""
        c = self.config = config
        self.encoder = Encoder(c)
        self.dense, self.ln_head = Linear(c.d_model, c.d_model), LayerNorm(c.d_model, epsilon=c.norm_epsilon)
        self.unembed_bias = parameter(c.vocab_size)
        initialise_encoder(self, c, seed)

    def logits(self, x: Float[Tensor, "... d_model"], tap: Tap = no_tap) -> Float[Tensor, "... vocab_size"]:
        """The head's scores for the encoder's output, at any positions."""
        h = tap("ln_head.normalized", self.ln_head(ACTIVATIONS[self.config.activation](self.dense(x))))
        return linear(h.contiguous(), self.encoder.embed.weight, self.unembed_bias)

    def __call__(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T vocab_size"]:
        """logits[b, t] scores the token that belongs at position t of row b."""
        return tap("logits", self.logits(self.encoder(tokens, segments, tap, dropout), tap))

    def at(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B n"], dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B n vocab_size"]:
        """The logits at some positions of each row only: training needs no others, and they cost the most."""
        x = self.encoder(tokens, dropout=dropout)
        B, T, d_model = (int(size) for size in x.shape)
        rows = positions.to(x.device) + Tensor.arange(B).reshape(B, 1).to(x.device) * T
        picked = embedding(x.reshape(B * T, d_model).contiguous(), rows.contiguous())  # (B, n, d_model)
        return self.logits(picked)

    def attention_sites(self) -> dict[str, AttentionSite]:
        return attention_site("self", self.encoder.blocks)


class Classifier:
    """An encoder whose head scores each class for a whole row of tokens."""

    def __init__(self, config: ClassifierConfig, seed: int | None = 0):
        """`seed` is as in `GPT`."""
        c = self.config = config
        self.encoder = Encoder(c)
        self.head = Linear(c.d_model, len(c.labels))
        initialise_encoder(self, c, seed)

    def __call__(
        self, tokens: Int[Tensor, "B T"], tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B n_labels"]:
        """logits[b, i] scores class i for row b."""
        x = self.encoder(tokens, tap=tap, dropout=dropout)
        if self.config.pooling == "first":
            pooled = x[:, 0]
        else:
            is_token = (tokens.to(x.device) != self.config.pad).unsqueeze(-1)  # (B, T, 1)
            pooled = is_token.where(x, 0).sum(1) / is_token.sum(1).maximum(1)  # (B, d_model)
        return tap("logits", self.head(dropout("pooled", tap("pooled", pooled.contiguous()))))

    def attention_sites(self) -> dict[str, AttentionSite]:
        return attention_site("self", self.encoder.blocks)


def initialise_encoder(model: Bert | Classifier, c: BertConfig, seed: int | None) -> None:
    """Sample initial weights; the standard deviation is BERT's 0.02 at width 768, more for narrower models.

    With 0.02, a narrow model's attention would start so uniform that it hardly learns where to look.
    seed=None leaves the weights unfilled.
    """
    if seed is not None:
        initialise(model, seed, c.n_layers if c.norm == "pre" else 0, 0.02 * math.sqrt(768 / c.d_model))
