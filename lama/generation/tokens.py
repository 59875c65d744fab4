"""The generation loop over token ids."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from lama.embeddings import check_ids
from lama.errors import LamaError, UsageError
from lama.generation.decoder import Decoder
from lama.generation.sampling import GREEDY, Sampling, next_token
from lama.models.gpt import GPT

WINDOW = "set window=True"  # the advice in an error; the command line says --window in its place
_idle: list[Decoder] = []  # the decoder that the last generation left, if no other is using it


@contextmanager
def borrowed_decoder(model: GPT, batch: int, jit: bool) -> Iterator[Decoder]:
    """A decoder for one generation alone; the one that the last generation left if it fits, so that nothing is compiled again."""
    decoder = _idle.pop() if _idle and _idle[0].fits(model, batch, jit) else Decoder(model, batch, jit)
    try:
        yield decoder
    finally:
        _idle[:] = [decoder]


def generate_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    end_of_text: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    window: bool = False,
    on_slide: Callable[[int], None] = lambda kept: None,
    jit: bool = True,
) -> Iterator[list[int | None]]:
    """Continue each prompt, a list of token ids; yields one list a step: a new token for each row, or None.

    A row yields None while the others catch up with its longer prompt, and after its end: `max_new_tokens`,
    `end_of_text`, a token or several (it is yielded), or a full context. Every row gives the same tokens as it would alone: rows walk
    in step from the shortest prompt's end, the longer ones fed from their prompt, each with its own stream of random
    numbers from `seed`.

    Only tokens below `vocab_size` are drawn (default: all that the model has): models are often padded beyond their
    tokenizer's. With `window`, a full context drops its older half and goes on; `on_slide` gets the number of tokens
    kept. A prompt that is longer than the context is cut as if it had been read token by token.
    Raises LamaError for an empty prompt, one that does not fit or has unknown ids, and for logits that are not finite.
    """
    context = model.config.context_length
    check_prompts(prompts, context, window)
    for prompt in prompts:
        check_ids(np.asarray(prompt), model.config.vocab_size)
    end_tokens = {end_of_text} if isinstance(end_of_text, int) else set(end_of_text or ())
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be 0 or above; got {max_new_tokens}")
    if max_new_tokens == 0:
        return
    rows = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + max_new_tokens for prompt in prompts]
    done = [False] * len(rows)
    rngs = [np.random.default_rng(seed) for _ in rows]

    with borrowed_decoder(model, len(prompts), jit) as decoder:
        n = min(map(len, rows))  # tokens of each row that have been fed
        kept = max(1, context // 2)
        dropped = context + 1 - kept  # by each slide: the new token needs a place too
        first = max(0, -(-(n - context) // dropped) * dropped)
        if first:
            on_slide(n - first)
        logits = decoder.prefill(np.array([row[first:n] for row in rows]))
        while True:
            step: list[int | None] = []
            for i, row in enumerate(rows):
                token = None
                if n == len(row) and not done[i]:
                    scores = logits[i, :vocab_size]
                    if not np.isfinite(scores).all():
                        raise LamaError(f"logits must be finite; got {scores.min()} to {scores.max()} at token {n}. Try --dtype float32")
                    token = next_token(scores, row, sampling, rngs[i])
                    row.append(token)
                    done[i] = token in end_tokens or len(row) == ends[i]
                elif n >= len(row):
                    row.append(0)  # the row has ended; the batch still needs a token in its place
                step.append(token)
            yield step
            n += 1
            if all(done):
                return
            if decoder.position < context:
                logits = decoder.decode(np.array([row[n - 1] for row in rows]))
            elif window:
                on_slide(kept)
                logits = decoder.prefill(np.array([row[n - kept : n] for row in rows]))
            else:
                return


def check_prompts(prompts: Sequence[Sequence[int]], context: int, window: bool) -> None:
    """Raises LamaError for a prompt that cannot be continued."""
    if not prompts:
        raise UsageError("prompts must hold at least one prompt; got none")
    for prompt in prompts:
        if not prompt:
            raise UsageError("prompt must hold at least one token; got an empty prompt. Give some text")
        if len(prompt) > context and not window:
            raise UsageError(f"prompt has {len(prompt)} tokens but context_length is {context}; shorten it or {WINDOW}")
