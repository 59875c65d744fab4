"""GPT: a decoder-only transformer. OpenAI's GPT-2 and the models lama trains are this one class."""

from dataclasses import dataclass

from tinygrad import Tensor

from lama.attention import MultiHeadAttention, make_similarity
from lama.blocks import Block, make_mlp, make_norm
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.embeddings import TokenEmbedding, make_positions, unembedding
from lama.errors import quoted
from lama.layers import LayerNorm, initialise
from lama.masks import Causal
from lama.models.config import check_config, check_length
from lama.models.protocol import AttentionSite, attention_site
from lama.ops import add
from lama.shapes import Float, Int
from lama.taps import Tap, no_tap, scoped


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2's 124M model."""

    vocab_size: int = 50257
    """Tokens the model knows."""
    context_length: int = 1024
    """Most tokens it can look at, prompt and continuation together."""
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
    tied: bool = True
    """The unembedding uses the token embedding's rows."""
    activation: str = "gelu_new"
    """gelu_new (tanh), gelu (exact), relu, silu, tanh or quick_gelu."""
    norm: str = "pre"
    """The place of the norms: pre (GPT-2), post (the 2017 paper) or none."""
    norm_epsilon: float = 1e-5
    """ε in the norms."""
    positions: str = "learned"
    """learned, sinusoidal or none."""
    similarity: str = "scaled_dot"
    """How attention scores a query and a key: scaled_dot, dot, general or additive."""
    residual: bool = True
    """Each sub-layer adds to the stream; without, its output takes the stream's place."""
    mlp: bool = True
    """Blocks have an MLP after their attention; without, d_mlp is 0."""
    scale_by_layer: bool = False
    """Attention scores of block i are divided by i + 1. Source: Karamcheti et al. 2021, Mistral."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a text, beside the tokenizer's own: generation stops there."""

    def __post_init__(self) -> None:
        check_config(self)  # also gives d_mlp its value
        if self.scale_by_layer and self.similarity not in ("dot", "scaled_dot"):
            raise ValueError(f"scale_by_layer requires similarity dot or scaled_dot; got {self.similarity!r}")
        for token in self.end_tokens:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                rule = f"end_tokens must be tokens below vocab_size={self.vocab_size}"
                raise ValueError(f"{rule}; got {quoted(token)}")


GPT2_CONFIGS = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": GPTConfig(d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": GPTConfig(d_model=1600, n_layers=48, n_heads=25),
}


def make_block(c: GPTConfig, layer: int) -> Block:
    """The block of a layer, counted from 0."""
    divisor = layer + 1 if c.scale_by_layer else 1
    similarity = make_similarity(c.similarity, c.n_heads, c.d_model // c.n_heads, divisor)
    return Block(
        attn=MultiHeadAttention(c.d_model, c.n_heads, c.bias, similarity),
        mlp=make_mlp(c.d_model, c.d_mlp, c.bias, c.activation),
        norm1=make_norm(c.d_model, c.bias, c.norm_epsilon, c.norm),
        norm2=make_norm(c.d_model, c.bias, c.norm_epsilon, c.norm) if c.d_mlp else None,
        order=c.norm,
        residual=c.residual,
    )


class GPT:
    """Embed, run the blocks, normalise, unembed. Source: Radford et al. 2019 (GPT-2).

    Weights are drawn from `seed`; seed=None leaves them unfilled for a checkpoint to fill.
    """

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        c = self.config = config
        self.embed = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_embed = make_positions(c.positions, c.context_length, c.d_model)
        self.blocks = [make_block(c, layer) for layer in range(c.n_layers)]
        self.ln_final = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "pre" else None
        self.unembed = None if c.tied else unembedding(c.d_model, c.vocab_size)
        if seed is not None:
            initialise(self, seed, c.n_layers)

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """The residual stream after the last block and norm, which the unembedding reads.

        With a `cache`, row b's tokens follow the cache.positions[b] tokens that it holds. Raises ValueError
        for more than `context_length` tokens, or than the cache can hold.
        """
        x = self.embedded(tokens, cache, tap, dropout)  # (B, T, d_model)
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        for i, (block, layer_cache) in enumerate(zip(self.blocks, caches, strict=True)):
            name = f"blocks.{i}"
            x = block(x, Causal(), cache=layer_cache, tap=scoped(tap, name), dropout=dropout.scoped(name))
        return self.normalised(x, tap)

    def embedded(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """The residual stream before the first block. Raises ValueError as `hidden` does."""
        device, T, tap = self.embed.weight.device, int(tokens.shape[1]), scoped(tap)
        check_length(T, self.config)
        if cache is not None:
            cache.check(T)
        start = None if cache is None else cache.positions
        x = tap("embed", self.embed(tokens.to(device)))  # (B, T, d_model)
        positions = tap("pos_embed", self.pos_embed(T, start).to(device))  # (T, d_model), or (B, T, d_model)
        return dropout("embed", add(x, positions))

    def normalised(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        """The final norm, where the model has one."""
        return x if self.ln_final is None else scoped(tap, "ln_final")("normalized", self.ln_final(x))

    def logits(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """The unembedding: a score for every token of the vocabulary."""
        return self.embed.unembed(x) if self.unembed is None else self.unembed(x)

    def __call__(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T vocab_size"]:
        """logits[b, t] scores the token that follows tokens[b, :t+1]."""
        return tap("logits", self.logits(self.hidden(tokens, cache, tap, dropout)))

    def new_cache(self, batch: int = 1, length: int | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `length` tokens, by default context_length."""
        c, weight = self.config, self.embed.weight
        length, d_head = length or c.context_length, c.d_model // c.n_heads
        return KVCache(c.n_layers, batch, c.n_heads, length, d_head, weight.dtype, str(weight.device))

    def attention_sites(self) -> dict[str, AttentionSite]:
        """The attention of the model, by kind: causal self-attention, if it has blocks."""
        return attention_site("self", self.blocks, causal=True)
