"""Perplexity of a long text under a model of limited context, in strided sliding windows."""

import math
from dataclasses import dataclass

from lama.data.inputs import check_tokens
from lama.errors import LamaError, UsageError
from lama.evaluation.likelihood import Progress, Row, checked_context, score, unwatched
from lama.models.protocol import CausalLM
from lama.tokenizers import Tokenizer


@dataclass(frozen=True)
class TextScore:
    """The result of a model on a text."""

    context_length: int
    stride: int
    tokens: int
    """Scored tokens: all but the text's first, if windows overlap."""
    n_bytes: int
    """UTF-8 bytes of the scored tokens."""
    nats: float
    """Σ −log p(token | the tokens before it in its window)."""

    @property
    def nats_per_token(self) -> float:
        """The mean loss of the scored tokens."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite if that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """A measure that compares models with different tokenizers."""
        return self.bits_per_token * (self.tokens / self.n_bytes)


def strided_windows(n_tokens: int, context_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, n_scored) of windows that move by `stride`; the last n_scored tokens are scored.

    A window's first token is context only. With a stride of context_length it is not scored; with a shorter
    stride every token but the text's first is scored once. All scored tokens have the same weight; the
    source's code gives every window but the first the weight of one token less.
    `strided_windows(8, 4, 2)` is `[(0, 4, 3), (2, 6, 2), (4, 8, 2)]`. Source: Hugging Face transformers,
    "Perplexity of fixed-length models", https://huggingface.co/docs/transformers/perplexity.
    """
    found, scored = [], 1  # the text's first token has no context
    for begin in range(0, n_tokens - 1, stride):
        end = min(begin + context_length, n_tokens)
        scored = max(scored, begin + 1)
        if end > scored:
            found.append((begin, end, end - scored))
        scored = end
        if end == n_tokens:
            break
    return found


def perplexity(
    model: CausalLM,
    tokenizer: Tokenizer,
    text: str,
    stride: int | None = None,
    context_length: int | None = None,
    progress: Progress = unwatched,
) -> TextScore:
    """Score a text in windows of `context_length` tokens that move by `stride`.

    The defaults are the model's context length and half a window: past the first window, every token has at
    least half a window before it. `progress` wraps the windows' scores. Raises UsageError for impossible
    windows, LamaError for a text that cannot be scored.
    """
    context_length = checked_context(model, context_length, least=2)
    stride = context_length // 2 if stride is None else stride
    if not 1 <= stride <= context_length:
        limits = f"at least 1 and at most context_length={context_length}"
        raise UsageError(f"stride must be {limits}; got {stride}")
    tokens = check_tokens(tokenizer, tokenizer.encode(text), model.config.vocab_size)
    if len(tokens) < 2:
        raise LamaError(f"perplexity needs at least two tokens; got {len(tokens)}")
    windows = strided_windows(len(tokens), context_length, stride)
    rows = [Row(tokens[begin:end], n) for begin, end, n in windows]
    found = progress(score(model, rows), len(rows))
    nats = -math.fsum(math.fsum(scores.log_probs.tolist()) for scores in found)
    n_bytes = sum(len(tokenizer.decode_bytes(tokens[end - n : end])) for _, end, n in windows)
    return TextScore(context_length, stride, sum(row.n_scored for row in rows), n_bytes, nats)
