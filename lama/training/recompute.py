"""Gradients block by block, from the last to the first, and of the logits in pieces of rows.

With `recompute`, each block is computed again in the backward pass, so that only the residual stream is kept
(Chen et al. 2016, section 4, with one segment a block). This takes a third more arithmetic, and half more if
only an adapter is trained. Otherwise the activations that a block's gradient needs are kept.
"""

from collections.abc import Iterable, Sequence

from tinygrad import Tensor
from tinygrad.nn.state import get_parameters

from lama import ops
from lama.dropout import Dropout
from lama.models.gpt import GPT
from lama.runtime.buffers import empty
from lama.training.loss import LOGITS, TokenLoss, copied, language_model_loss, pieces


def blockwise_gradients(
    model: GPT,
    arrays: Sequence[Tensor | None],
    smoothing: float,
    dropout: Dropout,
    weight: float,
    parameters: Iterable[Tensor],
    recompute: bool = True,
    loss_of: TokenLoss = language_model_loss,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss of `arrays`, and `weight` times its gradients, by the parameters' `id`.

    Only `parameters` get a gradient; the others are constants.
    """
    inputs, targets, starts, *rest = (*arrays, None)[: max(3, len(arrays))]
    assert inputs is not None and targets is not None
    mask, trained = model.mask(starts), {id(p) for p in parameters}
    found: dict[int, Tensor] = {}

    def trained_in(*parts: object) -> list[Tensor]:
        return [p for part in parts if part is not None for p in get_parameters(part) if id(p) in trained]

    def add(own: list[Tensor], gradients: list[Tensor], *others: Tensor) -> None:
        """Realise the gradients of the parameters `own`, added to earlier ones, and other tensors."""
        for p, gradient in zip(own, gradients, strict=True):
            found[id(p)] = found[id(p)] + gradient if id(p) in found else gradient
        if tensors := [*others, *(found[id(p)] for p in own)]:
            Tensor.realize(*tensors)

    def through(i: int, x: Tensor) -> Tensor:
        return model.blocks[i](x, mask, dropout=dropout.scoped(f"blocks.{i}"))

    # The realised stream between two blocks is a leaf of the graph: gradients stop there.
    x = model.embedded(inputs, dropout=dropout, mask=mask)
    stream, kept = [x.realize()], []
    dy = empty(*map(int, x.shape), device=str(x.device))
    for i, block in enumerate(model.blocks):
        y = through(i, stream[-1])
        if not recompute:  # the gradients' graph keeps what the block computes
            kept.append(y.gradient(stream[-1], *trained_in(block), gradient=dy))
        stream.append(y.contiguous().realize())

    top = trained_in(model.ln_final, model.unembed or model.embed)
    loss, dx, gradients = _top_gradients(model, stream.pop(), targets, rest, loss_of, smoothing, weight, top)
    add(top, gradients)
    for i in reversed(range(len(model.blocks))):
        own, x = trained_in(model.blocks[i]), stream.pop()
        if recompute:
            found_here = through(i, x).gradient(x, *own, gradient=dx)
        else:
            dy.assign(dx).realize()
            found_here = kept.pop()
        dx = found_here.pop(0).contiguous()
        add(own, found_here, dx)
    if bottom := trained_in(model.embed, model.pos_embed):
        y = model.embedded(inputs, dropout=dropout, mask=mask)
        add(bottom, y.gradient(*bottom, gradient=dx))
    return loss, found


def _top_gradients(
    model: GPT,
    x: Tensor,
    targets: Tensor,
    rest: Sequence[Tensor | None],
    loss_of: TokenLoss,
    smoothing: float,
    weight: float,
    own: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of the last stream x, and `weight` times its gradients for x and for the parameters `own`.

    Without `own`, rows are processed in pieces, so that few logits are in memory. A token's loss depends only
    on its own row, and its gradient is later multiplied by that of the whole loss. With `own`, all rows are
    processed at once: every piece would add to gradients as large as the unembedding.
    """
    rows, width = int(targets.numel()), int(x.shape[-1])
    flat, ids = x.reshape(1, rows, width), targets.reshape(1, rows)

    def losses_of(leaf: Tensor, piece: slice) -> Tensor:
        return ops.cross_entropy(model.logits(model.normalised(leaf)), ids[:, piece], smoothing)

    if own:
        leaf = copied(flat)
        loss = loss_of.reduce(losses_of(leaf, slice(rows)).reshape(targets.shape), *rest)
        dx, *of_own = (loss * weight).gradient(leaf, *own)
        dx = dx.contiguous()
        Tensor.realize(loss, dx, *of_own)
        return loss, dx.reshape(x.shape), of_own
    losses, of_x = [], []
    for piece in pieces(rows, LOGITS // model.config.vocab_size):
        leaf = copied(flat[:, piece])
        found = losses_of(leaf, piece)
        of_x.append(found.sum().gradient(leaf)[0].contiguous())
        losses.append(found.contiguous())
        Tensor.realize(losses[-1], of_x[-1])
    each = losses[0].cat(*losses[1:], dim=1).reshape(targets.shape).contiguous().realize()
    loss = loss_of.reduce(each, *rest)
    (factors,) = (loss * weight).gradient(each)
    dx = of_x[0].cat(*of_x[1:], dim=1).reshape(x.shape) * factors.unsqueeze(-1)
    Tensor.realize(loss, dx := dx.contiguous())
    return loss, dx, []
