"""Embeddings with their gradient; tinygrad's would multiply by a one-hot matrix (tokens, vocab_size)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.quantized import Quantized
from lama.kernels.tiles import tile_macros, tiles_of
from lama.runtime.fusion import Producer, producer_of, remember
from lama.runtime.internals import Ops
from lama.runtime.kernel import (
    C_TYPES,
    Gradients,
    Macros,
    are_fast_floats,
    inputs_of,
    is_fast,
    make_kernel,
    slices_for,
)
from lama.runtime.strides import materialise, shape_of


@dataclass(frozen=True)
class PositionRows(Producer):
    """n rows of a table: the first n, or for each row of the batch those from its position on."""

    table: UOp
    positions: UOp | None
    n: int


@dataclass(frozen=True)
class Embedded(Producer):
    """Rows of `weight`; with `scales`, `weight` is the values of a `Quantized` with rows of `d` numbers."""

    weight: UOp
    scales: UOp | None
    d: int
    tokens: UOp

    def with_rows(self, rows: PositionRows) -> Tensor | None:
        """The sum of both by one kernel; None if their sizes differ."""
        table, n = Tensor(rows.table), Tensor(self.tokens).shape[-1]
        if table.shape[1] != self.d or rows.n != n or rows.n > int(table.shape[0]):
            return None
        return self.tensor(table, None if rows.positions is None else Tensor(rows.positions))

    def tensor(self, table: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The rows by one kernel, plus those of `table` if there is one."""
        tokens, values = Tensor(self.tokens), Tensor(self.weight)
        shape = (*(int(size) for size in tokens.shape), self.d)
        tiles = tiles_of(values)
        inputs = [tokens.cast(dtypes.int32), values if tiles is None else tiles]
        macros = dict(_sizes(int(values.shape[0]), self.d, tokens))
        headers: tuple[str, ...] = ()
        if self.scales is None:
            macros |= {"WEIGHT": C_TYPES[values.dtype], **tile_macros(tiles)}
            headers = ("bfloat16.h", "tiles.h")
        else:
            weight = Quantized(values, Tensor(self.scales), self.d)
            inputs.append(weight.scales)
            macros |= {**weight.macros(), "K": self.d, "WEIGHT": "unsigned char"}
            headers = ("quantized.h",)
        if table is not None:
            inputs.append(table)
            macros |= {"POSITION_WEIGHT": C_TYPES[table.dtype], "POSITIONS": int(table.shape[0])}
            macros["CACHED"] = positions is not None
        if positions is not None:
            inputs.append(positions)
        slices = min(math.prod(shape[:-1]), _slices(math.prod(shape)))
        kernel = make_kernel("embedding.c", macros, slices=slices, headers=headers)
        learns = self.scales is None and tiles is None and positions is None
        y = kernel(shape, *inputs, gradient=_gradient if learns else None)
        return remember(y, self) if table is None else y


@dataclass(frozen=True)
class TokenGradient(Producer):
    """The gradient of a table: a row's is the sum of the rows of `dy` for the tokens that read it."""

    tokens: UOp
    dy: UOp

    def tensor(self, shape: tuple[int, ...], total: Tensor | None = None) -> Tensor:
        """The gradient by one kernel, of `shape`; or its sum with `total`, which is overwritten."""
        tokens, dy, (rows, d) = Tensor(self.tokens), Tensor(self.dy), shape
        n = int(tokens.numel())
        macros = {**_sizes(rows, d, tokens), "GRADIENT_OF_TOKENS": 1, "ADD": total is not None}
        # A slice computes some columns of the gradient, whole cache lines of every row.
        slices = min(max(1, d // 64), _slices(((rows if total is None else 0) + n) * d))
        kernel = make_kernel("embedding.c", macros, slices=slices, in_place=total is not None)
        if total is not None:
            return kernel.into([total], tokens, dy)[0]
        return remember(kernel(shape, tokens, dy), self)


def with_token_gradient(gradients: Sequence[Tensor]) -> list[Tensor]:
    """These gradients, but a sum of a product's and `TokenGradient`'s is computed in the product's memory."""
    return [_in_one(gradient, gradients) for gradient in gradients]


def _in_one(gradient: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    parts = [Tensor(part) for part in gradient.uop.src] if gradient.uop.op is Ops.ADD else []
    for rows, other in zip(parts, reversed(parts), strict=True):
        made = producer_of(rows, TokenGradient)
        if made is None or other.shape != gradient.shape or not are_fast_floats(other):
            continue
        # `other` is overwritten, so no other gradient may read it.
        if all(other.uop not in t.uop.toposort() for t in gradients if t is not gradient):
            return made.tensor(shape_of(gradient), materialise(other))
    return gradient


def embedding(weight: Tensor | Quantized, tokens: Tensor) -> Tensor | None:
    """`ops.embedding` by a kernel, which can also add `PositionRows`, or None."""
    if isinstance(weight, Quantized):
        values, scales, readable = weight.values, weight.scales.uop, is_fast(*weight.tensors(), tokens)
    else:
        values, scales, readable = weight, None, weight.dtype in C_TYPES and is_fast(weight, tokens)
    return Embedded(values.uop, scales, int(weight.shape[1]), tokens.uop).tensor() if readable else None


def fusible_rows(rows: Tensor, table: Tensor, n: int, positions: Tensor | None) -> Tensor:
    """`rows`, the result of `ops.position_rows`, recorded so that an embedding's kernel can add them."""
    if table.dtype not in C_TYPES or not is_fast(table):
        return rows
    if positions is None:
        return remember(rows.contiguous(), PositionRows(table.uop, None, n))
    return remember(rows, PositionRows(table.uop, positions.uop, n)) if is_fast(table, positions) else rows


def _sizes(rows: int, d: int, tokens: Tensor) -> Macros:
    return {"ROWS": rows, "D": d, "TOKENS": int(tokens.numel()), "LENGTH": int(tokens.shape[-1])}


def _slices(numbers: int) -> int:
    """The number of slices for a kernel that reads or writes so many numbers, whichever are more."""
    return slices_for(0.5 * numbers)


def _gradient(grad: UOp, call: UOp) -> Gradients:
    tokens, weight, *others = inputs_of(call)
    dy, n, (rows, d) = Tensor(grad), int(tokens.numel()), shape_of(weight)
    gradients = [TokenGradient(tokens.uop, grad).tensor((rows, d)).cast(weight.dtype).uop]
    for table in others:
        length = int(table.shape[0])
        macros = {**_sizes(rows, d, tokens), "POSITIONS": length, "GRADIENT_OF_POSITIONS": 1}
        kernel = make_kernel("embedding.c", macros, slices=min(length, _slices((length + n) * d)))
        gradients.append(kernel((length, d), dy).cast(table.dtype).uop)
    return None, None, *gradients
