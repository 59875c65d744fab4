"""Perplexity of a text under a model that sees only so many tokens at once: strided sliding windows."""

import math
from dataclasses import dataclass

from lama.data.inputs import check_tokens
from lama.errors import LamaError, UsageError
from lama.evaluation.likelihood import Progress, Row, score, unwatched
from lama.models.gpt import GPT
from lama.tokenizers import Tokenizer


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text."""

    context_length: int
    stride: int
    tokens: int
    """Tokens that were scored: all but the text's first, if windows overlap."""
    n_bytes: int
    """UTF-8 bytes of the scored tokens."""
    nats: float
    """Σ −log p(token | the tokens before it in its window)."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that is no float."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Compares models whatever their tokenizers."""
        return self.bits_per_token * (self.tokens / self.n_bytes)


def check_windows(model: GPT, stride: int | None, context_length: int | None) -> tuple[int, int]:
    """(context_length, stride), the defaults filled in. Raises UsageError."""
    context_length = model.config.context_length if context_length is None else context_length
    if not 2 <= context_length <= model.config.context_length:
        raise UsageError(f"context_length must be at least 2 and at most the model's {model.config.context_length}; got {context_length}")
    stride = context_length // 2 if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UsageError(f"stride must be at least 1 and at most context_length={context_length}; got {stride}")
    return context_length, stride


def windows(n_tokens: int, context_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, n_scored) of windows that move by `stride`; the last n_scored tokens of each were in none before it.

    Source: Hugging Face transformers, "Perplexity of fixed-length models",
    https://huggingface.co/docs/transformers/perplexity. A window's first token is context only, so with a stride of
    context_length the first of each goes unscored; with a shorter one every token but the text's first is scored once.
    Every scored token weighs the same; the code on that page lets each window but the first weigh one token less.
    `windows(8, 4, 2)` is `[(0, 4, 3), (2, 6, 2), (4, 8, 2)]`.
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
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    stride: int | None = None,
    context_length: int | None = None,
    progress: Progress = unwatched,
) -> TextScore:
    """Score a text in windows of `context_length` tokens (default: the model's) that move by `stride` (default: half a window).

    With the defaults every token but those of the first window has at least half a window before it. `progress` may
    watch the windows as they come. Raises UsageError for windows that cannot be, LamaError for a text that cannot be scored.
    """
    context_length, stride = check_windows(model, stride, context_length)
    tokens = check_tokens(tokenizer, tokenizer.encode(text), model.config.vocab_size)
    if len(tokens) < 2:
        raise LamaError(f"a text must have at least two tokens, one to predict and one before it; got {len(tokens)}")
    places = windows(len(tokens), context_length, stride)
    rows = [Row(tokens[begin:end], n) for begin, end, n in places]
    nats = -math.fsum(math.fsum(scores.log_probs.tolist()) for scores in progress(score(model, rows), len(rows)))
    n_bytes = sum(len(tokenizer.decode_bytes(tokens[end - n : end])) for _, end, n in places)
    return TextScore(context_length, stride, sum(row.n_scored for row in rows), n_bytes, nats)
