"""Generation over token ids: loops over the engine's steps."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from lama.embeddings import check_ids
from lama.errors import LamaError, UsageError
from lama.generation.decoder import Runner, context_of
from lama.generation.engine import Engine, Event, Request, check_prompt
from lama.generation.sampling import GREEDY, Sampling
from lama.models.protocol import CausalLM

_idle: list[Runner] = []  # the runner of the last generation, while none uses it


@contextmanager
def borrowed_engine(
    model: CausalLM, rows: int, vocab_size: int | None, jit: bool, context: int | None = None
) -> Iterator[Engine]:
    """An engine for one generation, on the last one's runner and its compiled steps where they fit."""
    wanted = model, rows, jit, context
    runner = _idle.pop() if _idle and _idle[0].fits(*wanted) else Runner(*wanted)
    try:
        yield Engine(model, rows, vocab_size, runner=runner)
    finally:
        _idle[:] = [runner]


def generate_events(
    model: CausalLM,
    request: Request,
    vocab_size: int | None = None,
    jit: bool = True,
    context: int | None = None,
) -> Iterator[Event]:
    """Yield the tokens of one request. Raises LamaError as `Engine` does."""
    with borrowed_engine(model, 1, vocab_size, jit, context) as engine:
        engine.submit(request)
        while engine.is_busy:
            for event in engine.step():
                yield without_error(event)


def generate_tokens(
    model: CausalLM,
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
    """Continue each prompt, a list of token ids. Each step yields every row's token, None after its end.

    A row ends with `max_new_tokens`, `end_of_text` (one token or several, also yielded) or a full context.
    Its tokens are those it would get alone: each row has its own stream of random numbers from `seed`.

    Only tokens below `vocab_size` (default: the model's) are sampled, as models may have more rows than their
    tokenizer has tokens. With `window`, a full context drops its older half and continues, and `on_slide`
    gets the number of tokens kept. A longer prompt is cut as if it had been fed token by token. Raises
    LamaError for an empty prompt, one that does not fit or has unknown ids, or logits that are not finite.
    """
    check_prompts(prompts, context_of(model), window)
    for prompt in prompts:
        check_ids(np.asarray(prompt), model.config.vocab_size)
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be 0 or above; got {max_new_tokens}")
    if max_new_tokens == 0:
        return
    end = {end_of_text} if isinstance(end_of_text, int) else set(end_of_text or ())
    with borrowed_engine(model, len(prompts), vocab_size, jit) as engine:
        rows = {
            engine.submit(Request(prompt, max_new_tokens, sampling, seed, end, window, on_slide)): row
            for row, prompt in enumerate(prompts)
        }
        texts: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        n = 0  # steps yielded so far
        while engine.is_busy:
            for event in engine.step():
                row = rows[event.request]
                token = without_error(event).token
                assert token is not None
                texts[row].append(token)
                ended[row] = event.finish_reason is not None
            while any(len(text) > n for text in texts) and all(
                over or len(text) > n for text, over in zip(texts, ended, strict=True)
            ):
                yield [text[n] if len(text) > n else None for text in texts]
                n += 1


def without_error(event: Event) -> Event:
    """Return the event. Raises LamaError if its request failed."""
    if event.error is not None:
        raise LamaError(event.error)
    return event


def check_prompts(prompts: Sequence[Sequence[int]], context: int, window: bool) -> None:
    """Raise UsageError for prompts that cannot be continued."""
    if not prompts:
        raise UsageError("prompts must hold at least one prompt; got none")
    for prompt in prompts:
        check_prompt(prompt, context, window)
