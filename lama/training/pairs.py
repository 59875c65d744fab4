"""Training an encoder-decoder on pairs of texts, evaluated on held-out pairs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
from tinygrad import Tensor

from lama.atomic import write_atomically
from lama.data.pairs import (
    Pair,
    encode_pairs,
    pair_arrays,
    pair_baselines,
    pair_batches,
    split_pairs,
    unigram_loss,
)
from lama.data.tasks import find_task
from lama.data.windows import evenly_spaced
from lama.errors import LamaError, UsageError
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.runtime.buffers import write
from lama.tokenizers import CharacterTokenizer, PairTokenizer, WordTokenizer
from lama.training.loop import Step, Trainer
from lama.training.loss import Evaluator, pair_loss
from lama.training.optimizers import zeros_like_all
from lama.training.rows import Rows, write_rows
from lama.training.session import Evaluation, Parts, Session
from lama.training.settings.pairs import PairSettings

ROOM = 50  # a generated target may have this many tokens more than its source
HELD_OUT = "held-out.tsv"
MOST_HELD_OUT = 1000  # pairs


def pair_model(config: PairSettings, tokenizer: PairTokenizer, lengths: Sequence[int]) -> Transformer:
    """An untrained model for texts of up to `lengths` tokens and longer targets. Raises UsageError."""
    context = max(256, 1 << (max(lengths) + ROOM - 1).bit_length())
    try:
        shape = TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=context,
            d_model=config.d_model,
            n_encoder_layers=config.n_layers,
            n_decoder_layers=config.n_layers,
            n_heads=config.n_heads,
            d_mlp=config.d_mlp,
            norm=config.norm,
            pad=tokenizer.pad,
            begin=tokenizer.begin,
            end=tokenizer.end,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Transformer(shape, config.seed)


class PairSession(Session):
    """The training of an encoder-decoder. With `average`, the result is the mean of the last models."""

    keeps_best = False
    config: PairSettings
    model: Transformer

    def __init__(self, parts: Parts, rows: Rows):
        super().__init__(parts, rows.digest)
        config, model = self.config, self.model
        self.about |= {"task": config.task, "settings": asdict(config)}
        self.data = encode_pairs(rows.train, self.tokenizer)
        self.held_out = held_out = encode_pairs(rows.held_out, self.tokenizer)
        batches = pair_batches(self.data, config.batch_size, config.seed)
        self.trainers.append(Trainer(model, batches, config, pair_loss, self.devices, self.team))
        n = len(held_out.pairs)
        batch = min(config.batch_size, n)
        arrays = pair_arrays(held_out, range(n), held_out.lengths, math.ceil(n / batch) * batch)
        self.evaluator = Evaluator(model, arrays, batch, pair_loss)
        average = config.average if config.average > 1 else 0
        steps = {config.steps - i * max(1, config.steps // 10) // average for i in range(average)}
        self.averaged = {step for step in steps if step > 0}
        """The steps after which a model is added to `sums`."""
        self.sums = zeros_like_all(self.trainer.parameters) if average else {}

    @property
    def plan(self) -> str:
        return f"{super().plan} pairs"

    def measure(self) -> dict[str, float]:
        return {"validation_loss": self.evaluator(self.shared)}

    def measure_baselines(self) -> None:
        vocab_size = self.model.config.vocab_size
        self.baselines = {"unigram": unigram_loss(self.data, self.held_out, vocab_size)}
        self.shares |= pair_baselines(self.data.pairs, self.held_out.pairs)

    def own_state(self) -> dict[str, Tensor]:
        return {f"sum.{name}": total for name, total in self.sums.items()}

    def after_step(self, step: Step) -> None:
        if step.step in self.averaged:
            parameters = self.trainer.parameters
            Tensor.realize(*(total.assign(total + parameters[name]) for name, total in self.sums.items()))

    def evaluate(self) -> Evaluation:
        """Evaluate the model; at the end, the mean of the last ones. Source: Vaswani et al. 2017, 6.1."""
        if self.sums and self.step == self.config.steps:
            n = np.float32(len(self.averaged))
            for name, total in self.sums.items():
                write(self.trainer.parameters[name], total.numpy() / n)
        return super().evaluate()


def new_pairs(parts: Parts) -> PairSession:
    """Prepare a training on pairs. Raises LamaError; the folder is then unchanged."""
    config, folder = parts.config, parts.folder
    task = find_task(config.task, config.tokenizer, config.held_out)
    parts.config = config = replace(config, tokenizer=task.tokenizer, held_out=task.held_out)
    train, held_out = split_pairs(task.make(), task.held_out, task.key)
    if not train or (task.held_out and not held_out):
        got = f"got {len(train)} and {len(held_out)}. Change --held-out"
        raise LamaError(f"there must be training pairs and held-out pairs; {got}")
    pairs = held_out or train
    held_out = [pairs[i] for i in evenly_spaced(len(pairs), min(len(pairs), MOST_HELD_OUT))]
    parts.tokenizer = tokenizer = pair_tokenizer(task.tokenizer, train)
    lengths = [encode_pairs(pairs, tokenizer).lengths for pairs in (train, held_out)]
    parts.model = pair_model(config, tokenizer, [max(each) for each in zip(*lengths, strict=True)])
    with folder.beginning(config, str(parts.about["command"])) as data:
        rows = write_rows(data, train, held_out)
    lines = "".join(f"{source}\t{target}\n" for source, target in held_out)
    write_atomically(folder.path / HELD_OUT, lines.encode())
    return PairSession(parts, rows)


def pair_tokenizer(kind: str, pairs: Sequence[Pair]) -> PairTokenizer:
    """A tokenizer of the characters or words of these pairs."""
    texts = [text for pair in pairs for text in pair]
    if kind == "words":
        return PairTokenizer(WordTokenizer.of(texts))
    return PairTokenizer(CharacterTokenizer("".join(sorted(set("".join(texts))))))
