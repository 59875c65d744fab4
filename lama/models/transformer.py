"""The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017): the same blocks, twice, joined by cross-attention."""

from dataclasses import dataclass

from tinygrad import Tensor
from tinygrad.nn.state import get_parameters

from lama.attention import KeysValues
from lama.blocks import Block
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.embeddings import TokenEmbedding, make_positions
from lama.layers import LayerNorm, initialise
from lama.masks import Causal, Mask, padding_mask
from lama.models.config import check_config
from lama.shapes import Bool, Float, Int, Size
from lama.taps import Tap, no_tap, scoped


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of an encoder-decoder. The defaults are the paper's base model."""

    vocab_size: int = 37_000
    """Tokens that source and target share."""
    context_length: int = 512
    """Most tokens of a source, and of a target."""
    d_model: int = 512
    """Width of the residual streams."""
    n_encoder_layers: int = 6
    """Blocks of the encoder."""
    n_decoder_layers: int = 6
    """Blocks of the decoder."""
    n_heads: int = 8
    """Heads in each attention; each is d_model / n_heads wide."""
    d_mlp: int = 0
    """Hidden width of the MLPs; 0 means 4 · d_model."""
    bias: bool = True
    """Biases in linear layers and norms."""
    activation: str = "relu"
    """relu (the paper), gelu_new, gelu, silu, tanh or quick_gelu."""
    norm: str = "post"
    """Where the norms stand: post (the paper), or pre, which adds one norm after each stack."""
    norm_epsilon: float = 1e-5
    """ε in the norms."""
    positions: str = "sinusoidal"
    """sinusoidal (the paper), or learned, one table for sources and targets."""
    similarity: str = "scaled_dot"
    """How attention scores a query and a key: scaled_dot, dot, general or additive."""
    pad: int = 0
    """The token that fills rows up: no attention looks at it."""
    begin: int = 1
    """The token that every target begins with."""
    end: int = 2
    """The token that ends a source and a target."""

    def __post_init__(self) -> None:
        check_config(self)
        if self.n_decoder_layers == 0:  # nothing else reads the source
            raise ValueError(f"n_decoder_layers must be at least 1; got n_decoder_layers={self.n_decoder_layers}")
        special = (self.pad, self.begin, self.end)
        if len(set(special)) < 3 or not all(0 <= token < self.vocab_size for token in special):
            raise ValueError(f"pad, begin and end must be three tokens below vocab_size; got {special}, vocab_size={self.vocab_size}")


class Transformer:
    """Encode the source once; decode the target, each position seeing those before it and the whole source.

    One matrix embeds source and target, times √d_model, and unembeds. Weights are drawn from `seed` with variance
    1 / d_model, so that embeddings weigh as much as positions; seed=None leaves them unfilled for a checkpoint to fill.
    """

    def __init__(self, config: TransformerConfig, seed: int | None = 0):
        c = self.config = config
        self.embed = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_embed = make_positions(c.positions, c.context_length, c.d_model)
        self.encoder, self.decoder = Stack(c, c.n_encoder_layers, cross=False), Stack(c, c.n_decoder_layers, cross=True)
        if seed is not None:
            initialise(self, seed, std=c.d_model**-0.5)

    def encode(
        self, source: Int[Tensor, "B S"], tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> tuple[Float[Tensor, "B S d_model"], Bool[Tensor, "B 1 1 S"]]:
        """The memory that the decoder reads, and the mask that hides the source's padding in it. Raises ValueError for a long source."""
        source = source.to(self.embed.weight.device)
        mask = padding_mask(source, self.config.pad)
        x = self._embedded(source, 0, scoped(tap, "encoder"), dropout.scoped("encoder"))
        for i, block in enumerate(self.encoder.blocks):
            site = f"encoder.blocks.{i}"
            x = block(x, mask, tap=scoped(tap, site), dropout=dropout.scoped(site))
        return self.encoder.normalised(x, scoped(tap, "encoder")), mask

    def decode(
        self,
        target: Int[Tensor, "B T"],
        memory: "Float[Tensor, 'B S d_model'] | list[KeysValues]",
        memory_mask: Bool[Tensor, "B 1 1 S"],
        cache: KVCache | None = None,
        position: Size = 0,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """The decoder's residual stream after its last block and norm: what the unembedding reads.

        `memory` and its mask are those of `encode`, or in the memory's place `keys_values(memory)`. `position` is where the
        target's first token stands; with a `cache`, the tokens before it are looked at there.
        Raises ValueError for a target past `context_length`.
        """
        target = target.to(self.embed.weight.device)
        T = int(target.shape[1])
        x = self._embedded(target, position, scoped(tap, "decoder"), dropout.scoped("decoder"))
        at = None
        if cache is not None and tap is no_tap and dropout.rate == 0 and self.decoder.blocks[0].attn.scale is not None:
            at = cache.stored_position(position, T)
        mask: Mask | None = Causal() & padding_mask(target, self.config.pad)
        if cache is not None:  # one token looks at all that is in the cache, itself included: nothing to hide
            mask = None if T == 1 and at is None else Causal(position if at is None else at)
        for i, block in enumerate(self.decoder.blocks):
            site, read = f"decoder.blocks.{i}", memory[i] if isinstance(memory, list) else memory
            x = block(x, mask, read, memory_mask, cache, i, position, scoped(tap, site), dropout.scoped(site))
        return self.decoder.normalised(x, scoped(tap, "decoder"))

    def keys_values(self, memory: Float[Tensor, "B S d_model"]) -> list[KeysValues]:
        """What each decoder block's cross-attention makes of the memory: the same for every token, so computed once."""
        return [block.cross_attn.keys_values(memory) for block in self.decoder.blocks if block.cross_attn is not None]

    def logits(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """Unembed: a score for every token of the vocabulary."""
        return self.embed.unembed(x)

    def __call__(
        self, source: Int[Tensor, "B S"], target: Int[Tensor, "B T"], tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B T vocab_size"]:
        """logits[b, t] scores the token that follows target[b, :t+1], given the whole of source[b]."""
        memory, mask = self.encode(source, tap, dropout)
        return tap("logits", self.logits(self.decode(target, memory, mask, tap=tap, dropout=dropout)))

    def _embedded(self, tokens: Tensor, position: Size, tap: Tap, dropout: Dropout) -> Tensor:
        end = position + tokens.shape[1]
        if isinstance(end, int) and end > self.config.context_length:
            raise ValueError(f"tokens must fit context_length; got {end} tokens, context_length={self.config.context_length}")
        positions = self.pos_embed(int(tokens.shape[1]), position).to(self.embed.weight.device)  # sinusoids come from the host
        x = tap("embed", self.embed(tokens) * self.config.d_model**0.5)  # (B, T, d_model)
        return dropout("embed", x + tap("pos_embed", positions))

    def new_cache(self, batch: int, length: int | None = None) -> KVCache:
        """An empty cache for the decoder's own keys and values: `batch` targets of up to `length` (default context_length) tokens."""
        c, weight = self.config, self.embed.weight
        length = length or c.context_length
        return KVCache(c.n_decoder_layers, batch, c.n_heads, length, c.d_model // c.n_heads, weight.dtype, str(weight.device))

    def n_parameters(self) -> int:
        """All parameters, the shared matrix counted once."""
        return sum(int(p.numel()) for p in get_parameters(self))

    def describe(self) -> str:
        """One line: `Transformer, 63,082,496 parameters: 6 + 6 layers x 8 heads, d_model 512, ...`."""
        c = self.config
        return (
            f"Transformer, {self.n_parameters():,} parameters: {c.n_encoder_layers} + {c.n_decoder_layers} layers x {c.n_heads} heads, "
            f"d_model {c.d_model}, d_mlp {c.d_mlp}, {c.norm}-norm, vocabulary {c.vocab_size:,}"
        )


class Stack:
    """Blocks, and the norm after them that a pre-norm stack needs."""

    def __init__(self, c: TransformerConfig, n_layers: int, cross: bool):
        self.blocks = [
            Block(c.d_model, c.n_heads, c.d_mlp, c.bias, c.activation, c.norm, c.norm_epsilon, c.similarity, cross, attention_dropout=False)
            for _ in range(n_layers)
        ]
        self.ln_final = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "pre" else None

    def normalised(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        """The final norm, where there is one."""
        return x if self.ln_final is None else tap("ln_final.normalized", self.ln_final(x))
