"""A model on one device with its gradients; a trainer has one for each device."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.fill import DTYPES
from lama.dropout import Dropout
from lama.kernels import matmul_precision
from lama.kernels.embedding import with_token_gradient
from lama.models.adapters import changes_of, trained_parameters
from lama.models.quantized import refuse_quantized
from lama.runtime.buffers import read_scalar
from lama.runtime.capture import CapturedStep, InputBuffer
from lama.runtime.strides import materialise
from lama.shapes import Array
from lama.training.loss import TokenLoss
from lama.training.recompute import blockwise_gradients
from lama.training.settings.base import TrainingConfig
from lama.training.sums import TreeSum

M = TypeVar("M")


class Replica:
    """A model and, in `gradients`, its gradients for a part of a batch, by its parameters' names.

    After the last part, they are the sum over all parts.
    """

    def __init__(
        self,
        model: Any,
        config: TrainingConfig,
        loss: Callable[..., Tensor],
        shares: int,
        parts: int | None = None,
    ):
        """A batch has `shares` equal parts, of which this replica computes `parts` (default: all)."""
        self.model, self.config, self.loss, self.shares = model, config, loss, shares
        self.parameters = trained_parameters(model)
        self.is_adapter = len(changes_of(model)) > 0
        if not self.is_adapter:
            refuse_quantized(model, "to be trained")
        for parameter in get_state_dict(model).values():
            parameter.replace(materialise(parameter).realize())  # weights of half precision may be in tiles
        self.device = str(next(iter(self.parameters.values())).device)
        self.gradients: dict[str, Tensor] = {}
        """Filled by the first call of `add` or `learn`; later calls overwrite the same buffers."""
        self.sum = TreeSum(parts or shares)
        self._inputs: list[InputBuffer] = []
        self.step = CapturedStep(matmul_precision(DTYPES[config.precision])(self._find_gradients))

    def add(self, i: int, key: Array, arrays: Sequence[Array]) -> float:
        """The mean loss of part `i` of a batch, arrays (rows, ...); its gradient is added to earlier parts'.

        `key` is as in `Dropout`.
        """
        loss = self.learn(key, arrays)
        self.sum.add(i, self.gradients)
        return loss

    def learn(self, key: Array, arrays: Sequence[Array]) -> float:
        """Replace `gradients` by those of one part of a batch, and return its mean loss."""
        arrays = [key, *arrays]
        self._inputs = self._inputs or [InputBuffer(self.device) for _ in arrays]
        return read_scalar(self.step(*(put(array) for put, array in zip(self._inputs, arrays, strict=True))))

    def _find_gradients(self, key: Tensor, *inputs: Tensor) -> Tensor:
        smoothing, dropout = self.config.label_smoothing, Dropout(self.config.dropout, key)
        if self.config.recompute or self.is_adapter:
            assert isinstance(self.loss, TokenLoss), "a loss of a GPT"
            loss, by_id = blockwise_gradients(
                self.model,
                inputs,
                smoothing,
                dropout,
                1 / self.shares,
                self.parameters.values(),
                self.config.recompute,
                self.loss,
            )
            found = [by_id[id(p)] for p in self.parameters.values()]
        else:
            loss = self.loss(self.model, *inputs, smoothing=smoothing, dropout=dropout)
            found = (loss / self.shares).gradient(*self.parameters.values())
        found = with_token_gradient([gradient.cast(dtypes.float32) for gradient in found])
        self.gradients = dict(zip(self.parameters, map(materialise, found), strict=True))
        Tensor.realize(loss, *self.gradients.values())
        return loss


def copy_to(model: M, device: str) -> M:
    """A copy of the model with its parameters on another device."""
    parameters = list(get_state_dict(model).values())
    copies = [p.to(device).contiguous() for p in parameters]
    Tensor.realize(*copies)
    return copy.deepcopy(model, {id(p): twin for p, twin in zip(parameters, copies, strict=True)})
