"""Training an encoder-decoder on pairs, judged by held-out ones, its last states averaged."""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.data.pairs import PairData, pair_arrays, pair_batches
from lama.errors import UsageError
from lama.models.transformer import Transformer, TransformerConfig
from lama.tokenizers import PairTokenizer
from lama.training.loop import Step, Trainer
from lama.training.loss import Evaluator, pair_loss
from lama.training.pair_settings import PairSettings

ROOM = 50  # tokens that a generated target may have more than its source


def pair_model(config: PairSettings, tokenizer: PairTokenizer, lengths: Sequence[int]) -> Transformer:
    """An untrained model for sources and targets up to `lengths`, and longer ones of their kind. Raises UsageError."""
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


class PairTrainer:
    """Iterate over it for a `Step` after each update; `finish` once it is over."""

    def __init__(self, model: Transformer, config: PairSettings, train: PairData, held_out: PairData, most: int = 1000):
        """`most`: held-out pairs whose loss is taken, those at the beginning."""
        self.model, self.config = model, config
        self.trainer = Trainer(model, pair_batches(train, config.batch_size, config.seed), config, pair_loss)
        n = min(most, len(held_out.pairs))
        rows = min(config.batch_size, n)
        self.loss = Evaluator(model, pair_arrays(held_out, range(n), held_out.lengths, math.ceil(n / rows) * rows), rows, pair_loss)
        """Call it for the held-out loss, nats per token."""
        self.stopped = False
        self._latest: deque[dict[str, np.ndarray]] = deque(maxlen=config.average)

    def stop(self) -> None:
        """End the iteration after the step under way."""
        self.stopped = True

    def __iter__(self) -> Iterator[Step]:
        steps, average = self.config.steps, self.config.average
        last = {steps - i * max(1, steps // 10) // average for i in range(average)} if average > 1 else set()
        for step in self.trainer:
            if step.step in last:
                self._latest.append({name: p.numpy() for name, p in self.trainer.parameters.items()})
            yield step
            if self.stopped:
                return

    def finish(self) -> None:
        """The mean of the last models takes the last one's place. Source: Vaswani et al. 2017, section 6.1."""
        if self._latest:
            means = {name: np.mean([model[name] for model in self._latest], axis=0) for name in self._latest[0]}
            parameters = get_state_dict(self.model)
            Tensor.realize(*(p.assign(Tensor(means[name], device=p.device)) for name, p in parameters.items()))
