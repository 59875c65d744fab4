"""BERT: an encoder that reads to both sides, with a head that fills in masked tokens, or one that names a class."""

import math
from dataclasses import dataclass

from tinygrad import Tensor
from tinygrad.nn.state import get_parameters

from lama.blocks import Block
from lama.dropout import Dropout, no_dropout
from lama.embeddings import TokenEmbedding, make_positions
from lama.errors import quoted
from lama.kernels import embedding
from lama.layers import ACTIVATIONS, LayerNorm, Linear, initialise, linear, parameter
from lama.masks import padding_mask
from lama.models.config import check_config
from lama.shapes import Float, Int
from lama.taps import Tap, no_tap, scoped

POOLINGS = ("mean", "first")


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder. The defaults are BERT's base model, uncased."""

    vocab_size: int = 30522
    """Tokens the model knows."""
    context_length: int = 512
    """Most tokens it can look at."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Blocks."""
    n_heads: int = 12
    """Heads in a block; each is d_model / n_heads wide."""
    d_mlp: int = 0
    """Hidden width of the MLP; 0 means 4 · d_model."""
    bias: bool = True
    """Biases in linear layers and norms."""
    activation: str = "gelu"
    """gelu (exact), gelu_new (tanh), relu, silu, tanh or quick_gelu."""
    norm: str = "post"
    """Where the norms stand: post (BERT) or pre (GPT-2)."""
    norm_epsilon: float = 1e-12
    """ε in the norms."""
    positions: str = "learned"
    """learned or sinusoidal."""
    segments: int = 2
    """Kinds of segment, each with an embedding that is added to its tokens; 0 for none."""
    pad: int = 0
    """The token that fills up short rows: nothing looks at it."""
    mask: int = 103
    """The token that stands where another is to be guessed."""

    def __post_init__(self) -> None:
        check_config(self)
        for name in ("pad", "mask"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} must be a token of the vocabulary; got {name}={getattr(self, name)}, vocab_size={self.vocab_size}"
                )
        if self.segments < 0:
            raise ValueError(f"segments must be at least 0; got segments={self.segments}")


@dataclass(frozen=True)
class ClassifierConfig(BertConfig):
    """An encoder, and the classes that its head tells apart."""

    labels: tuple[str, ...] = ("0", "1")
    """The names of the classes."""
    pooling: str = "mean"
    """What the head reads: the mean over all tokens that are not padding, or the first token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2 or not all(type(label) is str for label in self.labels) or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must be two or more different names; got {quoted(', '.join(map(str, self.labels)), plain=True)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {quoted(self.pooling)}")


class Encoder:
    """Embed tokens, positions and segments, normalise, run the blocks, each position looking at all that are not padding.

    Source: Devlin et al. 2018, section 3. With norm="pre", the norm stands after the last block instead.
    """

    def __init__(self, config: BertConfig):
        c = self.config = config
        self.embed = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_embed = make_positions(c.positions, c.context_length, c.d_model)
        self.segment_embed = TokenEmbedding(c.segments, c.d_model) if c.segments else None
        self.ln_embed = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "post" else None
        self.blocks = [Block(c.d_model, c.n_heads, c.d_mlp, c.bias, c.activation, c.norm, c.norm_epsilon) for _ in range(c.n_layers)]
        self.ln_final = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "pre" else None

    def __call__(
        self, tokens: Int[Tensor, "B T"], segments: Int[Tensor, "B T"] | None = None, tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B T d_model"]:
        """The residual stream at its end. Without `segments` all tokens are of segment 0.

        Raises ValueError for more than `context_length` tokens, and for segments where the model has none.
        """
        device = self.embed.weight.device
        tokens = tokens.to(device)
        T = int(tokens.shape[1])
        if self.config.context_length < T:
            raise ValueError(f"tokens must fit context_length; got {T} tokens, context_length={self.config.context_length}")
        if segments is not None and self.segment_embed is None:
            raise ValueError(f"segments must be left out for a model without them; got segments of shape {tuple(segments.shape)}")
        x = tap("embed", self.embed(tokens)) + tap("pos_embed", self.pos_embed(T).to(device))  # (B, T, d_model)
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
    """An encoder whose head scores every token of the vocabulary for each position: norm(act(dense(x))) Eᵀ + b.

    Source: Devlin et al. 2018, section 3.1, and google-research/bert, `get_masked_lm_output`.
    """

    def __init__(self, config: BertConfig, seed: int | None = 0):
        """Weights are drawn from `seed`; seed=None leaves them unfilled for a checkpoint to fill."""
        c = self.config = config
        self.encoder = Encoder(c)
        self.dense, self.ln_head = Linear(c.d_model, c.d_model), LayerNorm(c.d_model, epsilon=c.norm_epsilon)
        self.unembed_bias = parameter(c.vocab_size)
        if seed is not None:
            initialise(self, seed, c.n_layers if c.norm == "pre" else 0, start_std(c.d_model))

    def logits(self, x: Float[Tensor, "... d_model"], tap: Tap = no_tap) -> Float[Tensor, "... vocab_size"]:
        """What the head makes of the encoder's output, at any positions."""
        h = tap("ln_head.normalized", self.ln_head(ACTIVATIONS[self.config.activation](self.dense(x))))
        return linear(h.contiguous(), self.encoder.embed.weight, self.unembed_bias)

    def __call__(
        self, tokens: Int[Tensor, "B T"], segments: Int[Tensor, "B T"] | None = None, tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B T vocab_size"]:
        """logits[b, t] scores the token that belongs at position t of row b."""
        return tap("logits", self.logits(self.encoder(tokens, segments, tap, dropout), tap))

    def at(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B n"], tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B n vocab_size"]:
        """The logits of some positions of each row only; training needs no others, and they cost most."""
        x = self.encoder(tokens, tap=tap, dropout=dropout)
        B, T, d_model = (int(size) for size in x.shape)
        rows = positions.to(x.device) + Tensor.arange(B).reshape(B, 1).to(x.device) * T
        return self.logits(embedding(x.reshape(B * T, d_model).contiguous(), rows.contiguous()), tap)  # (B, n, d_model) -> (B, n, V)

    def n_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(int(p.numel()) for p in get_parameters(self))

    def describe(self) -> str:
        return describe("BERT", self.n_parameters(), self.config)


class Classifier:
    """An encoder whose head scores each class for a whole row of tokens."""

    def __init__(self, config: ClassifierConfig, seed: int | None = 0):
        """Weights are drawn from `seed`; seed=None leaves them unfilled for a checkpoint to fill."""
        c = self.config = config
        self.encoder = Encoder(c)
        self.head = Linear(c.d_model, len(c.labels))
        if seed is not None:
            initialise(self, seed, c.n_layers if c.norm == "pre" else 0, start_std(c.d_model))

    def __call__(self, tokens: Int[Tensor, "B T"], tap: Tap = no_tap, dropout: Dropout = no_dropout) -> Float[Tensor, "B n_labels"]:
        """logits[b, i] scores class i for row b."""
        x = self.encoder(tokens, tap=tap, dropout=dropout)
        if self.config.pooling == "first":
            pooled = x[:, 0]
        else:
            there = (tokens.to(x.device) != self.config.pad).unsqueeze(-1)  # (B, T, 1)
            pooled = there.where(x, 0).sum(1) / there.sum(1).maximum(1)  # (B, d_model)
        return tap("logits", self.head(dropout("pooled", tap("pooled", pooled.contiguous()))))

    def n_parameters(self) -> int:
        return sum(int(p.numel()) for p in get_parameters(self))

    def describe(self) -> str:
        return describe(f"classifier of {len(self.config.labels)}", self.n_parameters(), self.config)


def start_std(d_model: int) -> float:
    """BERT's 0.02 at its width of 768, more for narrow models: else their attention starts so flat that it hardly learns where to look."""
    return 0.02 * math.sqrt(768 / d_model)


def describe(what: str, n_parameters: int, c: BertConfig) -> str:
    """One line: `BERT, 109,514,298 parameters: 12 layers x 12 heads, d_model 768, ...`."""
    return (
        f"{what}, {n_parameters:,} parameters: {c.n_layers} layers x {c.n_heads} heads, d_model {c.d_model}, "
        f"d_mlp {c.d_mlp}, context {c.context_length}, vocabulary {c.vocab_size:,}"
    )
