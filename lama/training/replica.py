"""A model on one device with its gradients: what a trainer has one of for each device."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.fill import DTYPES
from lama.dropout import Dropout
from lama.jit import Input, capture_at_once, number
from lama.kernels import products_in, stored
from lama.models.quantized import refuse_quantized
from lama.training.config import TrainingConfig
from lama.training.recompute import blockwise_gradients


class Replica:
    """`model`, and in `gradients`, under its parameters' names, the sums that `add` makes."""

    def __init__(self, model: Any, config: TrainingConfig, loss: Callable[..., Tensor], shares: int):
        """`shares`: in how many equal parts a whole batch comes, here and on other devices together."""
        refuse_quantized(model, "to be trained")
        self.model, self.config, self.loss, self.shares = model, config, loss, shares
        self.parameters = get_state_dict(model)
        self.device = str(next(iter(self.parameters.values())).device)
        self.gradients: dict[str, Tensor] = {}
        if shares > 1:  # else they are those of the one part, where its kernels leave them
            self.gradients = {name: Tensor.zeros(*p.shape, device=self.device).contiguous() for name, p in self.parameters.items()}
            Tensor.realize(*self.gradients.values())
        self._inputs: list[Input] = []
        self._add = capture_at_once(products_in(DTYPES[config.precision])(self._add_gradients))

    def add(self, first: bool, key: np.ndarray, arrays: Sequence[np.ndarray]) -> float:
        """The mean loss of one part of a batch, arrays (rows, ...); its share of the gradient is added to those there, or, with
        `first`, takes their place. `key` is that of `Dropout`."""
        arrays = [np.array([not first], np.float32), key, *arrays]
        self._inputs = self._inputs or [Input(self.device) for _ in arrays]
        return number(self._add(*(put(array) for put, array in zip(self._inputs, arrays, strict=True))))

    def _add_gradients(self, keep: Tensor, key: Tensor, *inputs: Tensor) -> Tensor:
        smoothing, dropout = self.config.label_smoothing, Dropout(self.config.dropout, key)
        if self.config.recompute:
            loss, by_id = blockwise_gradients(self.model, inputs[0], inputs[1], smoothing, dropout, 1 / self.shares)
            found = [by_id[id(p)] for p in self.parameters.values()]
        else:
            loss = self.loss(self.model, *inputs, smoothing=smoothing, dropout=dropout)
            found = (loss / self.shares).gradient(*self.parameters.values())
        found = [gradient.cast(dtypes.float32) for gradient in found]
        if self.shares == 1:
            self.gradients = {name: stored(gradient) for name, gradient in zip(self.parameters, found, strict=True)}
        else:
            for total, gradient in zip(self.gradients.values(), found, strict=True):
                total.assign(total * keep + gradient)
        Tensor.realize(loss, *self.gradients.values())
        return loss


def copy_to(model: Any, device: str) -> Any:
    """The same model with its parameters on another device."""
    parameters = list(get_state_dict(model).values())
    copies = [p.to(device).contiguous() for p in parameters]
    Tensor.realize(*copies)
    return copy.deepcopy(model, {id(p): twin for p, twin in zip(parameters, copies, strict=True)})
