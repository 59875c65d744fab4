"""GPT: a decoder-only transformer. OpenAI's GPT-2 and the models lama trains are this one class."""

from dataclasses import dataclass

from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.blocks import Block
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.embeddings import LearnedPositions, TokenEmbedding, make_positions, unembedding
from lama.errors import quoted
from lama.kernels import Quantized
from lama.layers import LayerNorm, initialise
from lama.masks import Causal, Mask
from lama.models.config import check_config
from lama.shapes import Float, Int, Size
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
    """Where the norms stand: pre (GPT-2), post (the 2017 paper) or none."""
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
    """Attention scores in block i, counted from 0, are divided by i + 1. Source: Karamcheti et al. 2021, Mistral."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a text, as the model's files say; generation stops at these and at the tokenizer's own."""

    def __post_init__(self) -> None:
        check_config(self)
        if self.scale_by_layer and self.similarity not in ("dot", "scaled_dot"):
            raise ValueError(f"scale_by_layer requires similarity dot or scaled_dot; got {self.similarity!r}")
        for token in self.end_tokens:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(f"end_tokens must be tokens below vocab_size={self.vocab_size}; got {quoted(token)}")


GPT2_CONFIGS = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": GPTConfig(d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": GPTConfig(d_model=1600, n_layers=48, n_heads=25),
}


class GPT:
    """Embed, run the blocks, normalise, unembed. Source: Radford et al. 2019 (GPT-2).

    Weights are drawn from `seed`; seed=None leaves them unfilled for a checkpoint to fill.
    """

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        c = self.config = config
        self.embed = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_embed = make_positions(c.positions, c.context_length, c.d_model)
        self.blocks = [
            Block(
                c.d_model,
                c.n_heads,
                c.d_mlp,
                c.bias,
                c.activation,
                c.norm,
                c.norm_epsilon,
                c.similarity,
                residual=c.residual,
                divisor=i + 1 if c.scale_by_layer else 1,
            )
            for i in range(c.n_layers)
        ]
        self.ln_final = LayerNorm(c.d_model, c.bias, c.norm_epsilon) if c.norm == "pre" else None
        self.unembed = None if c.tied else unembedding(c.d_model, c.vocab_size)
        if seed is not None:
            initialise(self, seed, c.n_layers)

    def hidden(
        self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None, position: Size = 0, tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B T d_model"]:
        """The residual stream after the last block and norm: what the unembedding reads.

        `position` is where the first token stands; with a `cache`, the tokens before it are looked at there.
        Raises ValueError if the tokens reach past `context_length`.
        """
        x, mask = self.embedded(tokens, cache, position, tap, dropout)
        for i, block in enumerate(self.blocks):
            site = f"blocks.{i}"
            x = block(x, mask, cache=cache, layer=i, position=position, tap=scoped(tap, site), dropout=dropout.scoped(site))
        return self.normalised(x, tap)

    def embedded(
        self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None, position: Size = 0, tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> tuple[Float[Tensor, "B T d_model"], Mask | None]:
        """What the first block reads, and the mask of all blocks. Raises ValueError as `hidden` does."""
        tokens = tokens.to(self.embed.weight.device)
        T = int(tokens.shape[1])
        end = position + T
        if isinstance(end, int) and end > self.config.context_length:
            raise ValueError(f"tokens must fit context_length; got {end} tokens, context_length={self.config.context_length}")
        at: Size | Tensor | None = None
        if cache is not None and self.blocks and tap is no_tap and dropout.rate == 0 and self.blocks[0].attn.scale is not None:
            at = cache.stored_position(position, T)
        at = position if at is None else at
        if tap is no_tap and isinstance(self.pos_embed, LearnedPositions):
            x = dropout("embed", self.embed(tokens, self.pos_embed.weight, at))
        else:
            positions = self.pos_embed(T, position).to(self.embed.weight.device)  # sinusoids come from the host
            x = dropout("embed", tap("embed", self.embed(tokens)) + tap("pos_embed", positions))  # (B, T, d_model)
        # One token looks at all that is in the cache, itself included: nothing to hide.
        mask = None if T == 1 and not isinstance(at, Tensor) else Causal(at if cache is not None else 0)
        return x, mask

    def normalised(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        """The final norm, where the model has one."""
        return x if self.ln_final is None else scoped(tap, "ln_final")("normalized", self.ln_final(x))

    def logits(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """Unembed: a score for every token of the vocabulary."""
        return self.embed.unembed(x) if self.unembed is None else self.unembed(x)

    def __call__(
        self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None, position: Size = 0, tap: Tap = no_tap, dropout: Dropout = no_dropout
    ) -> Float[Tensor, "B T vocab_size"]:
        """logits[b, t] scores the token that follows tokens[b, :t+1]."""
        return tap("logits", self.logits(self.hidden(tokens, cache, position, tap, dropout)))

    def new_cache(self, batch: int = 1, length: int | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `length` (default context_length) tokens."""
        c, weight = self.config, self.embed.weight
        return KVCache(c.n_layers, batch, c.n_heads, length or c.context_length, c.d_model // c.n_heads, weight.dtype, str(weight.device))

    def n_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(int(p.numel()) for p in get_state_dict(self, tensor_type=(Tensor, Quantized)).values())

    def describe(self) -> str:
        """One line: `GPT, 124,439,808 parameters: 12 layers x 12 heads, d_model 768, ...`."""
        c = self.config
        return (
            f"GPT, {self.n_parameters():,} parameters: {c.n_layers} layers x {c.n_heads} heads, d_model {c.d_model}, "
            f"d_mlp {c.d_mlp}, context {c.context_length}, vocabulary {c.vocab_size:,}"
        )
