"""Fine-tuning on conversations: their data, the settings that depend on them, and prompts for samples."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lama.data import Corpus, TokenFiles, open_corpus
from lama.data.conversations import write_conversations
from lama.data.packing import PackedPairs, PackedRows
from lama.data.windows import evenly_spaced
from lama.errors import UsageError
from lama.files import read_text
from lama.models.gpt import GPT
from lama.shapes import Array
from lama.tokenizers import Tokenizer
from lama.tokenizers.base import TableTokenizer
from lama.tokenizers.chat_template import plain_template, template_of
from lama.tokenizers.export import with_template
from lama.training.session import Parts
from lama.training.settings import RunConfig
from lama.training.settings.base import Settings

CONTEXT = 1024  # the most tokens of a row, by default
DEFAULTS: Settings = {"batch_size": 4, "evaluation_tokens": 10_000}
"""Default settings of fine-tuning."""
EVALUATIONS = 4  # of a run, by default


def templated(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with the chat template that a setting names. Raises LamaError."""
    if not template:
        return tokenizer
    plain = template == "plain"
    return with_template(tokenizer, plain_template(tokenizer).source if plain else read_text(Path(template)))


def new_conversations(parts: Parts, corpus: Corpus, data: Path) -> TokenFiles:
    """Write the conversations as tokens into the folder `data`. Raises LamaError as `write_conversations`."""
    c: RunConfig = parts.config
    held_out = open_corpus(c.chat_held_out, parts.folder.path, read=False) if c.chat_held_out else None
    template = template_of(parts.tokenizer)
    more = c.context_length, c.validation, parts.progress, c.dpo > 0
    return write_conversations(corpus, held_out, parts.tokenizer, template, data, *more)


def packed_rows(tokens: TokenFiles, part: str, config: RunConfig) -> PackedRows:
    """The rows of a part of the data."""
    ids = tokens.train if part == "train" else tokens.validation
    more = config.context_length, config.seed, config.packing
    kind = PackedPairs if config.dpo else PackedRows
    return kind(ids, tokens.ends[part], tokens.counted[part], *more)


def held_out_arrays(held_out: PackedRows, config: RunConfig) -> tuple[Array, ...]:
    """The arrays of the held-out rows: all, or evenly spaced ones of `evaluation_tokens` in total."""
    rows = held_out.epoch(0)
    limit = config.evaluation_tokens and max(1, config.evaluation_tokens // config.context_length)
    return held_out.arrays([rows[i] for i in evenly_spaced(len(rows), min(len(rows), limit or len(rows)))])


def scheduled(config: RunConfig, given: Settings, tokens: TokenFiles) -> RunConfig:
    """The settings with the number of steps in the epochs, and matching warm-up and evaluations."""
    epochs = config.epochs if config.epochs or "steps" in given else 1
    steps = config.steps
    if epochs:
        steps = packed_rows(tokens, "train", config).steps(epochs, config.batch_size)
    warmup = config.warmup if "warmup" in given else min(config.warmup, steps // 10)
    every = config.evaluate_every if "evaluate_every" in given else -(-steps // EVALUATIONS)
    return replace(config, epochs=epochs, steps=steps, warmup=warmup, evaluate_every=every)


def add_end_token(model: GPT, tokenizer: Tokenizer, tokens: TokenFiles) -> None:
    """Let generation stop at the special token that ends the assistant's turns."""
    last = {int(tokens.train[end - 1]) for end in tokens.ends["train"] if tokens.counted["train"][end - 1]}
    added = tokenizer.added if isinstance(tokenizer, TableTokenizer) else ()
    special = {token.id for token in added if token.special} - {
        tokenizer.end_of_text,
        *model.config.end_tokens,
    }
    if last & special:
        ends = (*model.config.end_tokens, *sorted(last & special))
        model.config = replace(model.config, end_tokens=ends)


def prompts(tokens: TokenFiles, most: int, is_pairs: bool = False) -> Iterator[tuple[list[int], list[int]]]:
    """Some held-out conversations: the tokens before the assistant's last part, and those of that part.

    Of pairs, the conversations are those with the chosen answer.
    """
    ends = tokens.ends["validation"]
    step = 2 if is_pairs else 1
    for i in (step * i for i in evenly_spaced(len(ends) // step, min(len(ends) // step, most))):
        place = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        ids, counted = tokens.validation[place], np.flatnonzero(tokens.counted["validation"][place])
        before = np.flatnonzero(np.diff(counted) > 1)
        begin = int(counted[before[-1] + 1] if len(before) else counted[0])
        yield ids[:begin].tolist(), ids[begin : counted[-1] + 1].tolist()


def check_chat(config: RunConfig) -> None:
    """Raise UsageError for settings that cannot be combined."""
    if config.chat and not config.initial:
        raise UsageError("chat needs a model to fine-tune; got none. Add --from smollm2")
    if config.chat and config.corpus:
        raise UsageError("chat and corpus must not be given together; leave one of them out")
    chat_only = ("chat_held_out", ()), ("template", ""), ("epochs", 0), ("packing", True), ("dpo", 0.0)
    for name, default in chat_only:
        if (value := getattr(config, name)) != default and not config.chat:
            shown = " ".join(value) if isinstance(value, tuple) else value
            raise UsageError(f"{name} must be given with chat; got {shown} without it")
    if config.dpo and config.label_smoothing:
        raise UsageError(f"label_smoothing must be 0 with dpo; got {config.label_smoothing:g}. Leave it out")
    for name in ("mixture", "separate"):
        if config.chat and getattr(config, name):
            raise UsageError(f"{name} is for a corpus; got it with chat. Leave it out")
