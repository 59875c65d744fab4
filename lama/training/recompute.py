"""Gradients block by block: only the residual stream is stored, and each block is recomputed backwards.

This is a third more arithmetic, for a model whose activations would not fit in memory. Source: Chen et al.
2016, section 4, with one segment a block.
"""

from collections.abc import Sequence

from tinygrad import Tensor
from tinygrad.nn.state import get_parameters

from lama.dropout import Dropout
from lama.models.gpt import GPT
from lama.training.loss import cross_entropy


def blockwise_gradients(
    model: GPT, arrays: Sequence[Tensor | None], smoothing: float, dropout: Dropout, weight: float
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss of `language_model_loss` of `arrays`, and `weight` times its gradients by parameters' `id`."""
    inputs, targets, starts, weights = (*arrays, None, None)[:4]
    assert inputs is not None and targets is not None
    mask = model.mask(starts)
    found: dict[int, Tensor] = {}

    def back(y: Tensor, dy: Tensor | None, x: Tensor | None, parameters: list[Tensor]) -> Tensor | None:
        """Add the gradients of `parameters`, and return that of y's input x."""
        gradients = y.gradient(*([] if x is None else [x]), *parameters, gradient=dy)
        dx = None if x is None else gradients.pop(0)
        for p, gradient in zip(parameters, gradients, strict=True):
            found[id(p)] = found[id(p)] + gradient if id(p) in found else gradient
        Tensor.realize(*([] if dx is None else [dx.contiguous()]), *(found[id(p)] for p in parameters))
        return dx

    def through(i: int, x: Tensor) -> Tensor:
        return model.blocks[i](x, mask, dropout=dropout.scoped(f"blocks.{i}"))

    # A realised stream between two blocks is a leaf: recomputing from it does not reuse what was computed.
    x = model.embedded(inputs, dropout=dropout, mask=mask)
    stream = [x.realize()]
    for i in range(len(model.blocks)):
        stream.append(through(i, stream[-1]).contiguous().realize())

    loss = cross_entropy(model.logits(model.normalised(stream[-1])), targets, smoothing, weights)
    top = get_parameters(model.ln_final) if model.ln_final else []
    top = top + get_parameters(model.unembed or model.embed)
    dx = back(loss * weight, None, stream[-1], top)
    for i in reversed(range(len(model.blocks))):
        dx = back(through(i, stream[i]), dx, stream[i], get_parameters(model.blocks[i]))
    x = model.embedded(inputs, dropout=dropout, mask=mask)
    back(x, dx, None, [*get_parameters(model.embed), *get_parameters(model.pos_embed)])
    return loss.realize(), found
