"""The encoder-decoder of Vaswani et al. 2017: two stacks of the same blocks, joined by cross-attention."""

from dataclasses import dataclass
from functools import partial

from tinygrad import Tensor

from lama.attention import KeysValues, MultiHeadAttention, make_similarity
from lama.blocks import Block, make_mlp, make_norm
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.embeddings import TokenEmbedding, make_positions
from lama.layers import LayerNorm, initialise
from lama.masks import Causal, padding_mask
from lama.models.config import check_config, check_length
from lama.models.protocol import AttentionSite, attention_site
from lama.shapes import Bool, Float, Int
from lama.taps import Tap, no_tap, scoped


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of an encoder-decoder. The defaults are the paper's base model."""

    vocab_size: int = 37_000
    """Tokens in the vocabulary, which source and target share."""
    context_length: int = 512
    """The most tokens of a source, and of a target."""
    d_model: int = 512
    """Width of the residual streams."""
    n_encoder_layers: int = 6
    """Number of blocks in the encoder."""
    n_decoder_layers: int = 6
    """Number of blocks in the decoder."""
    n_heads: int = 8
    """Heads in each attention; each is d_model / n_heads wide."""
    d_mlp: int = 0
    """Hidden width of the MLPs; 0 means 4 · d_model."""
    bias: bool = True
    """Whether linear layers and norms have biases."""
    activation: str = "relu"
    """relu (the paper), gelu_new, gelu, silu, tanh or quick_gelu."""
    norm: str = "post"
    """The place of the norms: post (the paper), or pre, which adds one norm after each stack."""
    norm_epsilon: float = 1e-5
    """ε in the norms."""
    positions: str = "sinusoidal"
    """sinusoidal (the paper), or learned, one table for sources and targets."""
    similarity: str = "scaled_dot"
    """How attention scores a query and a key: scaled_dot, dot, general or additive."""
    pad: int = 0
    """The token that pads short rows; attention ignores it."""
    begin: int = 1
    """The token that every target begins with."""
    end: int = 2
    """The token that ends a source and a target."""

    def __post_init__(self) -> None:
        check_config(self)
        if self.n_decoder_layers == 0:  # nothing else reads the source
            raise ValueError("n_decoder_layers must be at least 1; got n_decoder_layers=0")
        special = (self.pad, self.begin, self.end)
        if len(set(special)) < 3 or not all(0 <= token < self.vocab_size for token in special):
            got = f"{special}, vocab_size={self.vocab_size}"
            raise ValueError(f"pad, begin and end must be three tokens below vocab_size; got {got}")


class Transformer:
    """Encode the source once; decode the target, whose positions see earlier ones and the whole source.

    The same matrix embeds source and target, times √d_model, and unembeds. Initial weights are sampled from
    `seed` with variance 1 / d_model, so that embeddings are as large as positions; seed=None is as in `GPT`.
    """

    def __init__(self, config: TransformerConfig, seed: int | None = 0):
        c = self.config = config
        self.embed = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_embed = make_positions(c.positions, c.context_length, c.d_model)
        self.encoder = Stack(c, c.n_encoder_layers, cross=False)
        self.decoder = Stack(c, c.n_decoder_layers, cross=True)
        if seed is not None:
            initialise(self, seed, std=c.d_model**-0.5)

    def encode(
        self, source: Int[Tensor, "B S"], tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> tuple[Float[Tensor, "B S d_model"], Bool[Tensor, "B 1 1 S"]]:
        """The memory that the decoder reads, and the mask that hides the source's padding in it.

        Raises ValueError for more than `context_length` tokens.
        """
        source = source.to(self.embed.weight.device)
        mask = padding_mask(source, self.config.pad)
        x = self._embedded(source, None, scoped(tap, "encoder"), dropout.scoped("encoder"))
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
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """The decoder's residual stream after its last block and norm, which the unembedding reads.

        `memory` and its mask come from `encode`; `keys_values(memory)` may replace the memory. With a
        `cache`, row b's tokens follow the cache.positions[b] tokens that it holds. Raises ValueError for more
        than `context_length` tokens, or more than the cache can hold.
        """
        target = target.to(self.embed.weight.device)
        if cache is not None:
            cache.check(int(target.shape[1]))
        positions = None if cache is None else cache.positions
        x = self._embedded(target, positions, scoped(tap, "decoder"), dropout.scoped("decoder"))
        mask = Causal() & padding_mask(target, self.config.pad)
        layers = [None] * len(self.decoder.blocks) if cache is None else cache.layers
        for i, (block, layer) in enumerate(zip(self.decoder.blocks, layers, strict=True)):
            site, read = f"decoder.blocks.{i}", memory[i] if isinstance(memory, list) else memory
            x = block(x, mask, read, memory_mask, layer, scoped(tap, site), dropout.scoped(site))
        return self.decoder.normalised(x, scoped(tap, "decoder"))

    def keys_values(self, memory: Float[Tensor, "B S d_model"]) -> list[KeysValues]:
        """The keys and values of each block's cross-attention, to be computed once for all target tokens."""
        layers = [block.cross_attn for block in self.decoder.blocks]
        return [attn.keys_values(memory) for attn in layers if attn is not None]

    def logits(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """A score for every token of the vocabulary."""
        return self.embed.unembed(x)

    def __call__(
        self,
        source: Int[Tensor, "B S"],
        target: Int[Tensor, "B T"],
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T vocab_size"]:
        """logits[b, t] scores the token that follows target[b, :t+1], given the whole of source[b]."""
        memory, mask = self.encode(source, tap, dropout)
        return tap("logits", self.logits(self.decode(target, memory, mask, tap=tap, dropout=dropout)))

    def _embedded(self, tokens: Tensor, positions: Tensor | None, tap: Tap, dropout: Dropout) -> Tensor:
        T, device = int(tokens.shape[1]), self.embed.weight.device
        check_length(T, self.config)
        x = tap("embed", self.embed(tokens) * self.config.d_model**0.5)  # (B, T, d_model)
        return dropout("embed", x + tap("pos_embed", self.pos_embed(T, positions).to(device)))

    def new_cache(self, batch: int, length: int | None = None) -> KVCache:
        """An empty cache for `batch` targets of up to `length` tokens, by default context_length."""
        c, weight = self.config, self.embed.weight
        length, d_head = length or c.context_length, c.d_model // c.n_heads
        dtype, device = weight.dtype, str(weight.device)
        return KVCache(c.n_decoder_layers, batch, c.n_heads, length, d_head, dtype, device)

    def attention_sites(self) -> dict[str, AttentionSite]:
        """The attention of the model, by kind: "encoder", "decoder" and "cross"."""
        encoder, decoder = self.encoder.blocks, self.decoder.blocks
        sites = attention_site("encoder", encoder, "encoder.")
        sites |= attention_site("decoder", decoder, "decoder.", causal=True)
        return sites | attention_site("cross", decoder, "decoder.", "cross_attn")


def make_block(c: TransformerConfig, cross: bool) -> Block:
    """A block of the encoder, or, with `cross`, of the decoder."""
    norm = partial(make_norm, c.d_model, c.bias, c.norm_epsilon, c.norm)

    def attention() -> MultiHeadAttention:
        similarity = make_similarity(c.similarity, c.n_heads, c.d_model // c.n_heads)
        return MultiHeadAttention(c.d_model, c.n_heads, c.bias, similarity)

    return Block(
        attn=attention(),
        mlp=make_mlp(c.d_model, c.d_mlp, c.bias, c.activation),
        norm1=norm(),
        norm2=norm(),
        order=c.norm,
        cross_attn=attention() if cross else None,
        norm_cross=norm() if cross else None,
        attention_dropout=False,
    )


class Stack:
    """Blocks, and the final norm that a pre-norm stack has after them."""

    def __init__(self, c: TransformerConfig, n_layers: int, cross: bool):
        self.blocks = [make_block(c, cross) for _ in range(n_layers)]
        self.ln_final = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "pre" else None

    def normalised(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        """x after the final norm, if there is one."""
        return x if self.ln_final is None else tap("ln_final.normalized", self.ln_final(x))
