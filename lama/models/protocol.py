"""The parts of a model that generation, evaluation and interpretation use, whatever its architecture."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tinygrad import Tensor

from lama.attention import MultiHeadAttention
from lama.blocks import Block
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.embeddings import TokenEmbedding
from lama.shapes import Float, Int
from lama.taps import Tap, no_tap


@runtime_checkable
class DecoderConfig(Protocol):
    """The fields that every decoder's config has, with the meanings of `GPTConfig`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...
    @property
    def end_tokens(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class AttentionSite:
    """One kind of attention in a model: "self", or "encoder", "decoder" and "cross"."""

    names: list[str]
    """The prefix of each layer's taps, such as `blocks.0.attn`."""
    modules: list[MultiHeadAttention]
    """The attention of each layer."""
    causal: bool
    """Whether no query looks at later keys."""


@runtime_checkable
class CausalLM(Protocol):
    """A decoder-only language model. `GPT` is one."""

    embed: TokenEmbedding
    blocks: list[Block]

    @property
    def config(self) -> DecoderConfig:
        """The model's config."""

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """The input of the unembedding. With a `cache`, tokens follow those that it holds."""

    def logits(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """A score for every token of the vocabulary."""

    def __call__(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T vocab_size"]:
        """The logits: [b, t] scores the token that follows tokens[b, :t+1]."""

    def new_cache(self, batch: int = 1, length: int | None = None) -> KVCache:
        """An empty cache for sequences of up to `length` tokens, by default context_length."""

    def attention_sites(self) -> dict[str, AttentionSite]:
        """The attention of the model, by kind; none without blocks."""


def attention_site(
    kind: str, blocks: list[Block], prefix: str = "", part: str = "attn", causal: bool = False
) -> dict[str, AttentionSite]:
    """{kind: the site of the attention named `part` in these blocks}; empty without blocks."""
    names = [f"{prefix}blocks.{i}.{part}" for i in range(len(blocks))]
    return {kind: AttentionSite(names, [getattr(block, part) for block in blocks], causal)} if blocks else {}
