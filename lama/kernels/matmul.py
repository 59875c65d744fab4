"""Matrix products: matmul.c reaches four fifths of a CPU core's peak, tinygrad's own schedule a twentieth."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from tinygrad import Tensor, UOp, dtypes

from lama.host import may_use_amx
from lama.kernels.elementwise import gelu_gradient
from lama.kernels.integers import integer_product, multiplies_integers
from lama.kernels.layernorm import Normalised, layernorm, layernorm_gradients, rmsnorm
from lama.kernels.matvec import FEW_ROWS, FEWEST_ROWS, ON_STACK, ROUNDED_ON_STACK, matvec
from lama.kernels.quantized import Quantized
from lama.kernels.tiles import rows_of, tile_macros, tiles_of
from lama.runtime.fusion import Producer, producer_of, remember
from lama.runtime.internals import DType
from lama.runtime.kernel import (
    C_TYPES,
    Gradient,
    Gradients,
    Macros,
    finds_instruction,
    inputs_of,
    is_fast,
    make_kernel,
    of_kernel,
    result_of,
    slices_for,
)
from lama.runtime.threads import threads

FLOPS, AMX_FLOPS = 100, 1000  # floating-point operations of a core in a nanosecond, roughly
PACKING = 2  # tiles are this many times larger than slices need to be: each packs its part of a and w
SMALL = 64  # the least rows or columns of a tile
PARTS = 2  # tiles for each thread, so that a late thread does not delay the others for long
# Nanoseconds on one core; shorter products are faster with one tile for each thread, since packing takes a
# tenth of their time.
SHORT = 2_000_000
COLUMNS = 64  # the most columns that sum_rows.c adds at a time

_precision: ContextVar[DType | None] = ContextVar("matmul_precision", default=None)


@contextmanager
def matmul_precision(dtype: DType) -> Iterator[None]:
    """Mixed precision: round the factors of every product in the block to `dtype`; sums stay float32.

    Source: Micikevicius et al. 2018, sections 3.1 and 3.3. bfloat16 has float32's range, so that the loss
    needs no scale.
    """
    token = _precision.set(None if dtype == dtypes.float32 else dtype)
    try:
        yield
    finally:
        _precision.reset(token)


def reduced_precision() -> DType | None:
    """The dtype that `matmul_precision` rounds factors to, if it is not float32; else None."""
    return _precision.get()


@functools.cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether the processor of this CPU device has an instruction for products of bfloat16.

    Without it, kernels multiply the same rounded numbers as floats.
    """
    return is_fast(Tensor.empty(1, device=device)) and finds_instruction(device, "bfloat16.h", "DOT2")


def matmul(
    a: Tensor,
    b: Tensor | Quantized,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Tensor | None = None,
) -> Tensor | None:
    """`ops.matmul` by a kernel, or None."""
    low = reduced_precision()
    if a.dtype != dtypes.float32 or low not in (None, dtypes.bfloat16):
        return None
    if not (bias is None or bias.shape == (b.shape[-2 if transpose_b else -1],)):
        return None
    added = None if bias is None else bias.uop
    if isinstance(b, Quantized):
        if low is not None or not is_fast(a, *b.tensors()):
            return None
        return _by_quantized(a, b, added, True, b.rounds).tensor()
    same_lead = b.ndim == 2 or a.shape[:-2] == b.shape[:-2]
    if not (same_lead and b.dtype in C_TYPES and is_fast(a, b)):
        return None
    rounds = low is not None or b.dtype == dtypes.bfloat16
    return Product(a.uop, b.uop, added, transpose_a, transpose_b, bfloat16=rounds).tensor()


def _by_quantized(a: Tensor, b: Quantized, bias: UOp | None, transpose_b: bool, rounds: bool) -> "Product":
    values, scales = (part.uop for part in b.tensors())
    return Product(a.uop, values, bias, False, transpose_b, scales=scales, d_in=b.d_in, rounds=rounds)


def product(
    a: Tensor,
    b: Tensor | Quantized,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """A product in a gradient, which kernels always support: a is in float32 and on the kernels' device."""
    if isinstance(b, Quantized):
        return of_kernel(_by_quantized(a, b, None, transpose_b, rounds=False).tensor())
    return of_kernel(Product(a.uop, b.uop, None, transpose_a, transpose_b, bfloat16=bfloat16).tensor())


@dataclass(frozen=True)
class Product(Producer):
    """a · b, and the other work of the same kernel: + bias, GELU, + residual, · factor."""

    a: UOp
    b: UOp
    bias: UOp | None
    transpose_a: bool
    transpose_b: bool
    gelu: bool = False
    residual: UOp | None = None
    factor: UOp | None = None
    scales: UOp | None = None
    """The scales of b, where b is the values of a `Quantized`."""
    d_in: int = 0
    """The length of a row of such a b."""
    rounds: bool = True
    """Whether a is rounded for a quantised b."""
    bfloat16: bool = False
    """Whether a and b are rounded to bfloat16."""

    def with_gelu(self) -> Tensor | None:
        return None if self._is_complete or self.gelu else replace(self, gelu=True).tensor()

    def times(self, factor: Tensor) -> Tensor | None:
        return None if self._is_complete or self.gelu else replace(self, factor=factor.uop).tensor()

    def with_residual(self, residual: Tensor) -> Tensor | None:
        return None if self._is_complete else replace(self, residual=residual.uop).tensor()

    @property
    def _is_complete(self) -> bool:
        """Whether the kernel cannot do any operation after this."""
        return self.residual is not None or self.factor is not None

    def tensor(self) -> Tensor | None:
        """The result by the first of KINDS that supports this product; None if there is none."""
        a = Tensor(self.a)
        for kind in KINDS:
            if (out := kind(self)) is not None:
                return remember(out.reshape(*a.shape[:-2], -1, out.shape[-1]), self)
        return None

    def inputs(self, norm: Normalised | None = None) -> dict[str, Tensor]:
        """The inputs by name. If b is a matrix, a and the residual become matrices too.

        With `norm`, the producer of a, they are the inputs of the normalisation and the product.
        """
        parts = {"a": self.a, "w": self.b, "scales": self.scales, "bias": self.bias}
        parts["residual"] = self.residual
        if norm is not None:
            parts |= {"a": norm.x, "norm_weight": norm.weight, "norm_bias": norm.bias}
        inputs = {name: Tensor(part) for name, part in parts.items() if part is not None}
        for name in ("a", "residual"):
            if name in inputs and inputs["w"].ndim == 2:
                inputs[name] = inputs[name].reshape(-1, inputs[name].shape[-1])
        return inputs


def few_rows(p: Product) -> Tensor | None:
    """The result by matvec.c, which also normalises a if a is the result of a norm; None if unsupported."""
    a, b = Tensor(p.a), Tensor(p.b)
    *lead, m, k = (int(n) for n in a.shape)
    if p.factor is not None or p.transpose_a or not p.transpose_b:
        return None
    if not _are_few(p, m if b.ndim > 2 else m * math.prod(lead), k):
        return None
    is_short = b.ndim == 2 and a.numel() <= min(ON_STACK, FEWEST_ROWS * k)
    norm = producer_of(a, Normalised) if is_short else None
    inputs = p.inputs(norm)
    epsilon, rms = (0.0, False) if norm is None else (norm.epsilon, norm.rms)
    gradient = _fused_gradient(tuple(inputs), p.gelu, epsilon, rms, tiles_of(b) is not None, p.rounds)
    return matvec(inputs, p.gelu, epsilon, rms, p.rounds, gradient)


def _are_few(p: Product, rows: int, k: int) -> bool:
    """Whether matvec.c multiplies so few rows; the other kernels give the same bits."""
    if p.bfloat16 and p.b.dtype != dtypes.bfloat16:
        return False
    are_rounded = p.bfloat16 or (p.scales is not None and p.rounds)
    return rows <= FEW_ROWS and (not are_rounded or rows * k <= ROUNDED_ON_STACK)


def integers(p: Product) -> Tensor | None:
    """The result by matmul_integers.c, for quantised weights and activations; None for others."""
    if p.scales is None or not p.rounds or not multiplies_integers(str(Tensor(p.b).device)):
        return None
    inputs = p.inputs()
    if "bias" in inputs:
        inputs["bias"] = inputs["bias"].cast(dtypes.float32)
    names = (*inputs, "integers", "their scales")
    if Quantized(inputs["w"], inputs["scales"], int(inputs["a"].shape[-1])).has_minima:
        names += ("their sums",)
    return integer_product(inputs, p.gelu, _fused_gradient(names, p.gelu, 0.0))


def dense(p: Product) -> Tensor | None:
    """The result by matmul.c: (batch, M, K) · (batch, K, N) -> (batch, M, N); a and b may be transposed.

    Quantised weights are read as they are stored. With GELU, the kernel also writes GELU's derivative, for a
    gradient.
    """
    if (p.scales is not None and p.rounds) or p.residual is not None:
        return None
    a, b = Tensor(p.a), Tensor(p.b)
    weight = None if p.scales is None else Quantized(b, Tensor(p.scales), p.d_in, rounds=False)
    # One b for the whole batch: the leading axes of a count as rows.
    is_one = math.prod(b.shape[:-2]) == 1 and not p.transpose_a
    if (p.gelu or p.factor is not None) and not is_one:
        return None
    # Only tiles of bfloat16 have the pairs that a product in bfloat16 needs.
    fit = p.transpose_b and is_one and p.bfloat16 == (b.dtype == dtypes.bfloat16)
    tiles = tiles_of(b) if fit else None
    if is_one:
        a = a.reshape(1, -1, a.shape[-1])
        b = b.reshape(1, *b.shape[-2:]) if weight is None else b
    else:
        b = b.expand(*a.shape[:-2], *b.shape) if b.ndim == 2 else b
        a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    (batch, m, k) = (int(n) for n in a.shape)
    n = int((b.shape[1:] if weight is None else weight.shape)[0 if p.transpose_b else 1])
    if p.transpose_a:
        m, k = k, m
    has_amx = p.bfloat16 and may_use_amx()
    # A gradient of weights has long sums, and every tile reads whole rows of a and b: few tiles are better.
    # With AMX too, since most of its time is reading.
    nanoseconds = 2 * batch * m * n * k / (AMX_FLOPS if has_amx else FLOPS)
    parts_m, parts_n, slices = _tiling(batch, m, n, nanoseconds, 1 if p.transpose_a or has_amx else PARTS)
    flags = {"BIAS": p.bias is not None, "GELU": p.gelu, "FACTOR": p.factor is not None}
    flags["BFLOAT16"] = p.bfloat16
    ams, aks = (1, m) if p.transpose_a else (k, 1)
    wks, wns = (1, k) if p.transpose_b else (n, 1)
    type_ = kind = C_TYPES.get(b.dtype, "unsigned char")
    headers: tuple[str, ...] = ("amx.h", "bfloat16.h", "tiles.h")
    macros: Macros = {"PARTS_M": parts_m, "PARTS_N": parts_n, "BATCH": batch, "M": m, "N": n, "K": k}
    macros |= {"AMS": ams, "AKS": aks, "WKS": wks, "WNS": wns, **flags, **tile_macros(tiles)}
    macros |= {"WEIGHT": type_, "W_NARROW": type_ != "float", "QUANTIZED": weight is not None, "AMX": has_amx}
    if weight is not None:
        macros, kind, headers = macros | weight.macros(), weight.kind, ("bfloat16.h", "quantized.h")
    label = f"{'nt'[p.transpose_a]}{'nt'[p.transpose_b]}_{batch}_{m}_{n}_{k}_{kind}"
    names = [name.lower() for name, flag in flags.items() if flag] + ["tiles"] * (tiles is not None)
    label = "_".join([label, *names])
    operations = 2 * batch * m * n * k
    kernel = make_kernel(
        "matmul.c", macros, label=label, operations=operations, slices=slices, headers=headers
    )
    outputs = [Tensor.empty(batch, m, n, device=a.device) for _ in range(1 + p.gelu)]
    inputs = [a, *([b if tiles is None else tiles] if weight is None else weight.tensors())]
    if p.bias is not None:
        inputs.append(Tensor(p.bias).cast(dtypes.float32))
    if p.factor is not None:  # in a gradient, which needs none of its own
        return kernel.into(outputs, *inputs, Tensor(p.factor))[0]
    gradient = _gradient_for(p.transpose_a, p.transpose_b, p.gelu, p.bfloat16, tiles is not None)
    if weight is not None:
        gradient = _gradient_through_quantized(p.gelu)
    return kernel.into(outputs, *inputs, gradient=gradient)[0]


KINDS: tuple[Callable[[Product], Tensor | None], ...] = (few_rows, integers, dense)
"""The kernels for products. The first that supports one computes it."""


@functools.cache
def _fused_gradient(
    names: tuple[str, ...],
    gelu: bool,
    epsilon: float,
    rms: bool = False,
    in_tiles: bool = False,
    rounds: bool = True,
) -> Gradient:
    """A gradient of one kernel for each operation, for rare cases: very short inputs and integer products.

    Weights that are quantised or in tiles have no gradient.
    """

    def gradient(grad_out: UOp, call: UOp) -> Gradients:
        inputs, grad = dict(zip(names, inputs_of(call), strict=True)), Tensor(grad_out)
        a, w, bias = inputs["a"], inputs["w"], inputs.get("bias")
        if in_tiles:
            w = rows_of(w, int(grad.shape[-1]), int(a.shape[-1]))
        norm_weight, norm_bias = inputs.get("norm_weight"), inputs.get("norm_bias")
        weight = Quantized(w, inputs["scales"], int(a.shape[-1]), rounds) if "scales" in inputs else w
        x = a
        if norm_weight is not None:
            y = rmsnorm(a, norm_weight, epsilon) if rms else layernorm(a, norm_weight, norm_bias, epsilon)
            x = of_kernel(y)
        gradients = {"residual": grad}
        if gelu:
            grad = gelu_gradient(of_kernel(matmul(x, weight, transpose_b=True, bias=bias)), grad)
        gradients["bias"] = sum_rows(grad)
        if isinstance(weight, Tensor) and not in_tiles:
            gradients["w"] = product(grad, x, transpose_a=True, bfloat16=w.dtype == dtypes.bfloat16)
        grad = product(grad, weight, bfloat16=w.dtype == dtypes.bfloat16)
        if norm_weight is not None:
            norm_gradients = layernorm_gradients(grad, a, norm_weight, epsilon, rms=rms)
            grad, gradients["norm_weight"], gradients["norm_bias"], _ = norm_gradients
        gradients["a"] = grad
        found = {name: g.cast(inputs[name].dtype).uop for name, g in gradients.items() if name in inputs}
        return None, *(found.get(name) for name in names)

    return gradient


@functools.cache
def _gradient_for(
    transpose_a: bool, transpose_b: bool, gelu: bool, bfloat16: bool, in_tiles: bool
) -> Gradient:
    """d(ab + bias) = da·b + a·db + dbias: two products, whether a and b are transposed or not, and a sum.

    A matrix b in tiles has no gradient.
    """

    def gradient(grad_out: UOp, call: UOp) -> Gradients:
        (a, b, *bias), grad = inputs_of(call, 1 + gelu), Tensor(grad_out)
        if in_tiles:
            b = rows_of(b, int(grad.shape[-1]), int(a.shape[-1]))
        if gelu:
            grad = _times(grad, result_of(call, 1))
        if transpose_a:
            grad_a = product(b.float(), grad, transpose_b, True, bfloat16)
        else:
            grad_a = product(grad, b, False, not transpose_b, bfloat16)
        if transpose_b:
            grad_b = product(grad, a, True, transpose_a, bfloat16)
        else:
            grad_b = product(a, grad, not transpose_a, False, bfloat16)
        found = [grad_a.cast(a.dtype).uop, None if in_tiles else grad_b.cast(b.dtype).uop]
        found += [sum_rows(grad).uop for _ in bias]
        return (None, None, *found) if gelu else (None, *found)

    return gradient


@functools.cache
def _gradient_through_quantized(gelu: bool) -> Gradient:
    """d(a wᵀ + bias) = da·wᵀ + dbias: a quantised w is a constant, and is read as it is stored."""

    def gradient(grad_out: UOp, call: UOp) -> Gradients:
        (a, values, scales, *bias), grad = inputs_of(call, 1 + gelu), Tensor(grad_out)
        if gelu:
            grad = _times(grad, result_of(call, 1))
        of_a = product(grad, Quantized(values, scales, int(a.shape[-1])))
        found = [of_a.uop, None, None, *(sum_rows(grad).uop for _ in bias)]
        return (None, None, *found) if gelu else (None, *found)

    return gradient


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor, materialised; two tensors of one shape."""
    producer = producer_of(x, Producer)
    fused = None if producer is None else producer.times(factor)
    return (x * factor).contiguous() if fused is None else fused.reshape(x.shape)


def sum_rows(x: Tensor) -> Tensor:
    """The gradient of a bias: the sum of a kernel's result x over all axes but the last, (..., N) -> (N,)."""
    *lead, n = (int(size) for size in x.shape)
    rows = math.prod(lead)
    slices = min(-(-n // COLUMNS), slices_for(0.4 * rows * n))
    return make_kernel("sum_rows.c", {"ROWS": rows, "N": n}, slices=slices)((n,), x)


def _tiling(batch: int, m: int, n: int, nanoseconds: float, parts: int) -> tuple[int, int, int]:
    """The numbers of tiles along the rows and columns of each product of a batch, and of slices for them all.

    Tiles are close to square and at least SMALL wide; a long product has `parts` for each thread.
    """
    wanted = slices_for(nanoseconds)
    if wanted <= batch:
        return 1, 1, wanted
    most = (parts if nanoseconds > SHORT else 1) * threads() if threads() > 1 else 1
    wanted = min(slices_for(nanoseconds / PACKING), most)
    if wanted > threads():  # the same number for each thread
        wanted = -(-wanted // threads()) * threads()
    rows, columns = 1, 1
    for count in range(-(-wanted // batch), 1, -1):
        pairs = [(i, count // i) for i in range(1, count + 1) if count % i == 0]
        pairs = [(i, j) for i, j in pairs if _are_large(m, i) and _are_large(n, j)]
        if pairs:  # tiles close to square read the least of a and b
            rows, columns = min(pairs, key=lambda pair: m / pair[0] + n / pair[1])
            break
    return rows, columns, batch * rows * columns if batch == 1 else min(wanted, batch * rows * columns)


def _are_large(size: int, parts: int) -> bool:
    return parts == 1 or size // parts >= SMALL
