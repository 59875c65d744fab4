"""The embeddings: tinygrad's gradient of the tokens' is a product with a one-hot matrix over the whole vocabulary."""

import math

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.program import STORED_TYPES, Kernel, inputs_of, is_fast, slices_for
from lama.kernels.quantized import Quantized


def embedding(weight: Tensor | Quantized, tokens: Tensor, positions: Tensor | None = None, position: int | UOp | Tensor = 0) -> Tensor:
    """weight[tokens] in float32: (rows, d), (..., T) ints -> (..., T, d). A token that is no row gives zeros.

    With `positions` (length, d), its T rows from `position` on are added: a number, or a stored int32 of shape (1,).
    """
    quantized = isinstance(weight, Quantized)
    parts = weight.tensors() if isinstance(weight, Quantized) else [weight]
    tables = ([] if quantized else parts) + ([] if positions is None else [positions])
    if positions is not None and isinstance(position, int) and position:
        positions, position = positions[position:], 0
    cached = isinstance(position, Tensor)
    there = positions is None or (positions.shape[0] >= tokens.shape[-1] and positions.shape[1] == weight.shape[1])
    fast = there and all(t.dtype in STORED_TYPES for t in tables) and is_fast(*parts, *tables, tokens)
    if not fast or isinstance(position, UOp):
        # Only negative tokens need the zeros: tinygrad counts them from the end, and gives zeros for those past it.
        rows = (tokens < 0).unsqueeze(-1).where(0, weight[tokens].float() if isinstance(weight, Quantized) else weight.float()[tokens])
        if positions is None:
            return rows
        n = tokens.shape[-1]
        # A number of half precision is widened first: tinygrad gathers by adding up, which it cannot do with bfloat16 everywhere.
        return rows + (
            positions.float()[position + Tensor.arange(n)] if isinstance(position, Tensor) else positions[position : position + n]
        )
    shape = (*(int(size) for size in tokens.shape), int(weight.shape[1]))
    inputs = [tokens.cast(dtypes.int32), *parts, *([] if positions is None else [positions])]
    macros = [*_sizes(weight, tokens)]
    if isinstance(weight, Quantized):
        macros += [*weight.macros(), ("K", weight.d_in), ("WEIGHT", "unsigned char")]
    else:
        macros.append(("WEIGHT", STORED_TYPES[weight.dtype]))
    if positions is not None:
        macros += [("POSITION_WEIGHT", STORED_TYPES[positions.dtype]), ("POSITIONS", int(positions.shape[0])), ("CACHED", int(cached))]
    if isinstance(position, Tensor):
        inputs.append(position)
    kernel = _kernel("forward", macros, shape, math.prod(shape[:-1]), ("quantized.h",) * quantized)
    return kernel(shape, *inputs, gradient=None if quantized else _gradient)


def _sizes(weight: Tensor | Quantized, tokens: Tensor) -> list[tuple[str, str | int]]:
    rows, d = (int(size) for size in weight.shape)
    return [("ROWS", rows), ("D", d), ("TOKENS", int(tokens.numel())), ("LENGTH", int(tokens.shape[-1]))]


def _kernel(kind: str, macros: list[tuple[str, str | int]], shape: tuple[int, ...], most: int, headers: tuple[str, ...] = ()) -> Kernel:
    """`most`: slices; `shape`: of the numbers that are written, or read if these are more."""
    name = "_".join(str(value).strip("_").replace(" ", "_") for _, value in macros)
    slices = min(most, slices_for(0.5 * math.prod(shape)))
    return Kernel(f"lama_embedding_{kind}_{name}", "embedding.c", tuple(macros), slices=slices, headers=headers)


def _gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    tokens, weight, *others = inputs_of(call)
    dy, d = Tensor(grad), int(weight.shape[1])
    macros = _sizes(weight, tokens)
    # A slice's rows of the gradient are some cache lines long.
    kernel = _kernel("of_tokens", [*macros, ("GRADIENT_OF_TOKENS", 1)], (int(weight.shape[0]) + int(tokens.numel()), d), max(1, d // 64))
    gradients = [kernel((int(weight.shape[0]), d), tokens, dy).cast(weight.dtype).uop]
    if len(others) == 1:
        rows = int(others[0].shape[0])
        kernel = _kernel(
            "of_positions", [*macros, ("POSITIONS", rows), ("GRADIENT_OF_POSITIONS", 1)], (rows + int(tokens.numel()), d), rows
        )
        gradients.append(kernel((rows, d), dy).cast(others[0].dtype).uop)
    return None, None, *gradients, *(None for _ in others[len(gradients) - 1 :])
