"""GPT: a decoder-only transformer. GPT-2, Llama, Gemma and the models lama trains are this one class."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from tinygrad import Tensor

from lama.attention import MultiHeadAttention, QKNorm, make_similarity, soft_cap
from lama.blocks import DECODER_NORMS, Block, make_mlp
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.embeddings import POSITIONS, TokenEmbedding, make_positions, unembedding
from lama.errors import quoted
from lama.layers import NORM_KINDS, Norm, initialise, new_norm
from lama.masks import Causal, packed
from lama.models.config import CHOICES as SHARED_CHOICES
from lama.models.config import LARGEST, check_config, check_length
from lama.models.protocol import AttentionSite, attention_site
from lama.ops import add
from lama.rotary import Rope
from lama.shapes import Float, Int
from lama.taps import Tap, no_tap, scoped

CHOICES = SHARED_CHOICES | {
    "norm": DECODER_NORMS,
    "norm_kind": NORM_KINDS,
    "layout": ("sequential", "parallel", "parallel_one_norm"),
    "positions": (*POSITIONS, "rope"),
    "qk_norm": ("none", "head", "all", "head_after"),
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2's 124M model."""

    vocab_size: int = 50257
    """Tokens in the vocabulary."""
    context_length: int = 1024
    """The most tokens of a row, prompt and continuation together."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Number of blocks."""
    n_heads: int = 12
    """Heads in a block."""
    d_mlp: int = 0
    """Hidden width of the MLP; 0 means 4 · d_model."""
    bias: bool = True
    """Whether linear layers and norms have biases."""
    tied: bool = True
    """Whether the unembedding uses the token embedding's rows."""
    activation: str = "gelu_new"
    """gelu_new (tanh), gelu (exact), relu, silu, tanh, quick_gelu or relu2 (squared)."""
    norm: str = "pre"
    """The place of the norms: pre (GPT-2), post (the paper), none, output (OLMo 2) or sandwich (Gemma 2)."""
    norm_epsilon: float = 1e-5
    """ε in the norms."""
    positions: str = "learned"
    """learned, sinusoidal, rope (rotary) or none."""
    similarity: str = "scaled_dot"
    """How attention scores a query and a key: scaled_dot, dot, general or additive."""
    residual: bool = True
    """Whether a sub-layer's output is added to the residual stream; otherwise it replaces the stream."""
    mlp: bool = True
    """Whether blocks have an MLP after their attention; otherwise d_mlp is 0."""
    scale_by_layer: bool = False
    """Whether attention scores of block i are divided by i + 1. Source: Karamcheti et al. 2021, Mistral."""
    end_tokens: tuple[int, ...] = ()
    """Tokens at which generation stops, in addition to the tokenizer's end of text."""
    n_kv_heads: int = 0
    """Heads of keys and values, each for n_heads / n_kv_heads heads of queries; 0 means n_heads."""
    d_head: int = 0
    """Width of a head; 0 means d_model / n_heads."""
    qkv_bias: bool | None = None
    """Whether queries, keys and values have biases; None: as `bias`."""
    out_bias: bool | None = None
    """Whether attention's output projection has a bias; None: as `bias`."""
    mlp_bias: bool | None = None
    """Whether the MLP has biases; None: as `bias`."""
    head_bias: bool = False
    """Whether the unembedding has a bias for each token; only with tied=False."""
    gated: bool = False
    """Whether the MLP is down(activation(gate(x)) · up(x)) instead of down(activation(up(x)))."""
    norm_kind: str = "layer"
    """layer (LayerNorm) or rms (RMSNorm)."""
    norm_weight: bool = True
    """Whether norms multiply by a learned weight; otherwise they have no bias either."""
    layout: str = "sequential"
    """sequential; parallel (GPT-NeoX): attention and MLP read the same x; parallel_one_norm (GPT-J)."""
    d_rotated: int = 0
    """Numbers of a head that rope rotates; 0 means d_head."""
    rope_theta: float = 10000.0
    """θ of rope."""
    rope_scaling: tuple[float, ...] = ()
    """Slower rotation for long contexts: (factor,), or Llama 3's (factor, low, high, length); see `Rope`."""
    rope_layers: tuple[bool, ...] = ()
    """Whether layers have rope, repeated over all: SmolLM3 has (True, True, True, False); () means all do."""
    windows: tuple[int, ...] = ()
    """The most keys that a query sees, 0 for all, repeated over the layers: GPT-Neo has (0, 256)."""
    local_theta: float = 0.0
    """θ of layers with a window, which then are not scaled (Gemma 3); 0 means the same as other layers."""
    qk_norm: str = "none"
    """Norms of queries and keys: none, head (Qwen 3), all heads (OLMo 2), head_after rope (nanochat)."""
    attention_scale: float = 0.0
    """The factor of scaled_dot; 0 means 1 / √d_head."""
    attention_cap: float = 0.0
    """c in c · tanh(score / c), which caps attention scores; 0 means no cap."""
    logit_cap: float = 0.0
    """c in c · tanh(logit / c), which caps logits; 0 means no cap."""
    embed_scale: float = 1.0
    """The factor of token embeddings; √d_model in Gemma."""

    def __post_init__(self) -> None:
        check_config(self, CHOICES)  # also replaces defaults such as d_mlp=0
        for name in ("scale_by_layer", "attention_scale", "attention_cap"):
            if getattr(self, name) and self.similarity not in ("dot", "scaled_dot"):
                raise ValueError(f"{name} requires similarity dot or scaled_dot; got {self.similarity!r}")
        self._check_rope()
        self._check_heads()
        for token in self.end_tokens:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                rule = f"end_tokens must be tokens below vocab_size={self.vocab_size}"
                raise ValueError(f"{rule}; got {quoted(token)}")

    def _check_rope(self) -> None:
        if not self.d_rotated:
            object.__setattr__(self, "d_rotated", self.d_head)
        is_odd = self.positions == "rope" and self.d_rotated % 2 == 1
        if is_odd or not 1 <= self.d_rotated <= self.d_head:
            got = f"d_rotated={self.d_rotated}, d_head={self.d_head}"
            raise ValueError(f"d_rotated must be even, and at most d_head; got {got}")
        numbers = [value for value in self.rope_scaling if type(value) in (int, float) and value > 0]
        if len(self.rope_scaling) not in (0, 1, 4) or len(numbers) < len(self.rope_scaling):
            rule = "rope_scaling must be (factor,) or (factor, low, high, length), all positive"
            raise ValueError(f"{rule}; got {quoted(self.rope_scaling)}")
        if len(numbers) == 4 and numbers[1] >= numbers[2]:
            raise ValueError(f"rope_scaling must have low < high; got {quoted(self.rope_scaling)}")
        if not all(type(each) is bool for each in self.rope_layers):
            raise ValueError(f"rope_layers must be a list of true and false; got {quoted(self.rope_layers)}")
        if not all(type(each) is int and 0 <= each <= LARGEST for each in self.windows):
            raise ValueError(f"windows must be whole numbers of at least 0; got {quoted(self.windows)}")

    def _check_heads(self) -> None:
        if self.n_heads % self.n_kv_heads:
            got = f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
            raise ValueError(f"n_heads must be a multiple of n_kv_heads; got {got}")
        if self.layout != "sequential" and self.norm not in ("pre", "none"):
            raise ValueError(f"layout={self.layout} requires norm pre or none; got {self.norm!r}")
        if self.head_bias and self.tied:
            raise ValueError("head_bias must be False with tied=True; got head_bias=True")
        for name in ("rope_theta", "embed_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0; got {name}={getattr(self, name)}")
        for name in ("local_theta", "attention_scale", "attention_cap", "logit_cap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {name}={getattr(self, name)}")


GPT2_CONFIGS = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": GPTConfig(d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": GPTConfig(d_model=1600, n_layers=48, n_heads=25),
}


def make_block(c: GPTConfig, layer: int) -> Block:
    """The block of a layer, counted from 0."""
    has_norms, has_mlp, sandwich = c.norm != "none", c.d_mlp > 0, c.norm == "sandwich"
    return Block(
        attn=make_attention(c, layer),
        mlp=make_mlp(c.d_model, c.d_mlp, bool(c.mlp_bias), c.activation, c.gated),
        norm1=norm(c) if has_norms else None,
        norm2=norm(c) if has_norms and has_mlp and c.layout != "parallel_one_norm" else None,
        order=c.norm,
        residual=c.residual,
        parallel=c.layout != "sequential",
        norm1_post=norm(c) if sandwich else None,
        norm2_post=norm(c) if sandwich and has_mlp else None,
    )


def make_attention(c: GPTConfig, layer: int) -> MultiHeadAttention:
    """The attention of a layer, counted from 0."""
    window = c.windows[layer % len(c.windows)] if c.windows else 0
    rope = Rope(c.d_rotated, c.rope_theta, c.rope_scaling)
    if window and c.local_theta:
        rope = Rope(c.d_rotated, c.local_theta)
    has_rope = c.positions == "rope" and (not c.rope_layers or c.rope_layers[layer % len(c.rope_layers)])
    divisor = layer + 1 if c.scale_by_layer else 1
    return MultiHeadAttention(
        c.d_model,
        c.n_heads,
        bool(c.qkv_bias),
        make_similarity(c.similarity, c.n_heads, c.d_head, divisor, c.attention_scale, c.attention_cap),
        n_kv_heads=c.n_kv_heads,
        d_head=c.d_head,
        out_bias=c.out_bias,
        qk_norm=make_qk_norm(c),
        rope=rope if has_rope else None,
        window=window,
    )


def make_qk_norm(c: GPTConfig) -> QKNorm | None:
    """The norms of queries and keys, or None for a model without them."""
    if c.qk_norm == "none":
        return None
    whole = c.qk_norm == "all"
    n_q, n_k = (c.n_heads, c.n_kv_heads) if whole else (1, 1)
    return QKNorm(partial(norm, c), n_q * c.d_head, n_k * c.d_head, whole, c.qk_norm == "head_after")


def norm(c: GPTConfig, width: int = 0) -> Norm:
    """A norm of d_model numbers, or of `width`."""
    return new_norm(width or c.d_model, c.norm_kind, c.norm_weight, c.bias, c.norm_epsilon)


class GPT:
    """Embed, run the blocks, normalise, unembed. Source: Radford et al. 2019 (GPT-2).

    Initial weights are sampled from `seed`; seed=None leaves them unfilled, for a checkpoint to fill.
    """

    sampling: Mapping[str, float] = MappingProxyType({})
    """Fields of `Sampling` that a loaded model's files recommend: the command line's defaults."""
    name: str = ""
    """The name or path from which the model was loaded."""
    family: str = ""
    """Hugging Face's `model_type` in the file from which the model was loaded, if it has one."""

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        c = self.config = config
        self.embed = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_embed = make_positions(c.positions, c.context_length, c.d_model)
        self.blocks = [make_block(c, layer) for layer in range(c.n_layers)]
        self.ln_final = norm(c) if c.norm in ("pre", "output", "sandwich") else None
        self.unembed = None if c.tied else unembedding(c.d_model, c.vocab_size, c.head_bias)
        if seed is not None:
            initialise(self, seed, c.n_layers)

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
        starts: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T d_model"]:
        """The residual stream after the last block and norm, which the unembedding reads.

        With a `cache`, row b's tokens follow the cache.positions[b] tokens that it holds. With `starts`, as
        in `Causal`, a row holds several texts that do not see each other. Raises ValueError for both at once,
        and for more tokens than `context_length` or the cache allows.
        """
        if cache is not None and starts is not None:
            raise ValueError("starts cannot be combined with a cache; got both")
        mask = self.mask(starts)
        x = self.embedded(tokens, cache, tap, dropout, mask)  # (B, T, d_model)
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        for i, (block, layer_cache) in enumerate(zip(self.blocks, caches, strict=True)):
            name = f"blocks.{i}"
            x = block(x, mask, cache=layer_cache, tap=scoped(tap, name), dropout=dropout.scoped(name))
        return self.normalised(x, tap)

    def mask(self, starts: Int[Tensor, "B T"] | None = None) -> Causal:
        """The mask of every block; with `starts`, for rows that hold several texts."""
        return Causal() if starts is None else packed(starts.to(self.embed.weight.device))

    def embedded(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
        mask: Causal | None = None,
    ) -> Float[Tensor, "B T d_model"]:
        """The residual stream before the first block. Raises ValueError as `hidden` does."""
        device, T, tap = self.embed.weight.device, int(tokens.shape[1]), scoped(tap)
        check_length(T, self.config)
        if cache is not None:
            cache.check(T)
        start = (mask.places if mask else None) if cache is None else cache.positions
        x = self.embed(tokens.to(device))  # (B, T, d_model)
        x = tap("embed", x if self.config.embed_scale == 1 else x * self.config.embed_scale)
        positions = tap("pos_embed", self.pos_embed(T, start).to(device))  # (T, d_model), or (B, T, d_model)
        return dropout("embed", add(x, positions))

    def normalised(self, x: Float[Tensor, "B T d_model"], tap: Tap = no_tap) -> Float[Tensor, "B T d_model"]:
        """x after the final norm, if the model has one."""
        return x if self.ln_final is None else scoped(tap, "ln_final")("normalized", self.ln_final(x))

    def logits(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """The unembedding: a score for every token of the vocabulary."""
        logits = self.embed.unembed(x) if self.unembed is None else self.unembed(x)
        return soft_cap(logits, self.config.logit_cap)

    def __call__(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
        starts: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T vocab_size"]:
        """logits[b, t] scores the token that follows tokens[b, :t+1]; the arguments are those of `hidden`."""
        return tap("logits", self.logits(self.hidden(tokens, cache, tap, dropout, starts)))

    def new_cache(self, batch: int = 1, length: int | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `length` tokens, by default context_length."""
        c, weight = self.config, self.embed.weight
        length = length or c.context_length
        return KVCache(c.n_layers, batch, c.n_kv_heads, length, c.d_head, weight.dtype, str(weight.device))

    def attention_sites(self) -> dict[str, AttentionSite]:
        """The attention of the model, by kind: causal self-attention, or nothing without blocks."""
        return attention_site("self", self.blocks, causal=True)
