"""Matrix products: tinygrad's own schedule for one reaches a twentieth of what a CPU core can do, matmul.c four fifths."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType

from lama.kernels.elementwise import gelu_gradient
from lama.kernels.fusion import Record, made, maker, then
from lama.kernels.integers import integer_product, multiplies_integers, rounded
from lama.kernels.layernorm import Normalised, layernorm, layernorm_gradients
from lama.kernels.matvec import FEW_ROWS, ON_STACK, matvec
from lama.kernels.pool import threads
from lama.kernels.program import STORED_TYPES, Gradient, Kernel, inputs_of, is_fast, slices_for
from lama.kernels.quantized import Quantized, dequantized

FLOPS = 100  # floating-point operations that a core does in a nanosecond, about
PACKING = 2  # each part copies what it reads of a and w: parts are larger than they need be to be handed out
SMALL = 64  # the least rows or columns of a part
PARTS = 2  # for each thread, so that one that is late does not hold up the others for long
SHORT = 2_000_000  # nanoseconds on one core, up to which one part for each thread is better: packing is a tenth of such a product
COLUMNS = 64  # that sum_rows.c takes at a time, at most


_factors: ContextVar[DType | None] = ContextVar("factors", default=None)


@contextmanager
def products_in(dtype: DType) -> Iterator[None]:
    """Within it, the factors of every product are rounded to `dtype`, such as bfloat16, and their sums kept in float32:
    mixed precision. Source: Micikevicius et al. 2018, sections 3.1 and 3.3; bfloat16 has float32's range, so the loss needs no scale.
    """
    token = _factors.set(None if dtype == dtypes.float32 else dtype)
    try:
        yield
    finally:
        _factors.reset(token)


def factors_are_rounded() -> bool:
    """Whether this is within `products_in` of less than float32."""
    return _factors.get() is not None


def matmul(a: Tensor, b: Tensor | Quantized, transpose_a: bool = False, transpose_b: bool = False, bias: Tensor | None = None) -> Tensor:
    """a · b + bias over the last two axes, a and b transposed first where asked; (..., M, K) · (..., K, N) + (N,) -> (..., M, N).

    Either both have the same leading axes, or b has none and serves them all. The result has a's dtype; b may be
    stored in half precision, and is widened as it is read, or quantised, and is then transposed; with a quantised b, the rows of
    a, if they are more than FEW_ROWS, are rounded to 8 bits, too (`lama.kernels.integers`).
    """
    if isinstance(b, Quantized):
        return _quantized(a, b, bias)
    if (low := _factors.get()) is not None:
        a, b = (x.cast(low) for x in (a, b))
        a, b = a.transpose(-2, -1) if transpose_a else a, b.transpose(-2, -1) if transpose_b else b
        y = a.matmul(b, dtype=dtypes.float32)
        return y if bias is None else (y + bias).contiguous_backward()
    same_lead = b.ndim == 2 or a.shape[:-2] == b.shape[:-2]
    fits = bias is None or bias.shape == (b.shape[-2 if transpose_b else -1],)
    if not (same_lead and fits and a.dtype == dtypes.float32 and b.dtype in STORED_TYPES and is_fast(a, b)):
        y = (a.transpose(-2, -1) if transpose_a else a) @ (b.transpose(-2, -1) if transpose_b else b).cast(a.dtype)
        # Stored on the way back, not left lazy: the bias's gradient would compute it again, product and activation included.
        return y if bias is None else (y + bias).contiguous_backward()
    k, k_b = a.shape[-2 if transpose_a else -1], b.shape[-1 if transpose_b else -2]
    if k != k_b:
        raise ValueError(f"the inner sizes of a product must agree; got {a.shape} and {b.shape}")
    product = Product(a.uop, b.uop, None if bias is None else bias.uop, transpose_a, transpose_b).tensor()
    assert product is not None, "a product by itself has a kernel"
    return product


def _quantized(a: Tensor, b: Quantized, bias: Tensor | None) -> Tensor:
    """a · bᵀ + bias. Few rows are multiplied by the integers as they are read; many are rounded to integers themselves."""
    if a.shape[-1] != b.d_in:
        raise ValueError(f"the inner sizes of a product must agree; got {a.shape} and {b.shape}")
    fits = bias is None or bias.shape == (b.shape[0],)
    fast = fits and a.dtype == dtypes.float32 and is_fast(a, *b.tensors()) and _factors.get() is None
    few = math.prod(a.shape[:-1]) <= FEW_ROWS
    if not (fast and (a.numel() <= 4 * ON_STACK if few else multiplies_integers(b.device))):
        return matmul(a if few else rounded(a), dequantized(b), transpose_b=True, bias=bias)
    product = Product(a.uop, b.values.uop, None if bias is None else bias.uop, False, True, scales=b.scales.uop).tensor()
    assert product is not None, "a product by itself has a kernel"
    return product


@dataclass(frozen=True)
class Product(Record):
    """a · b, and what follows in the same kernel: + bias, GELU, + residual, · factor."""

    a: UOp
    b: UOp
    bias: UOp | None
    transpose_a: bool
    transpose_b: bool
    gelu: bool = False
    residual: UOp | None = None
    factor: UOp | None = None
    scales: UOp | None = None
    """Of b, where that is the values of a `Quantized`."""

    def then(self, step: str, *others: Tensor) -> Tensor | None:
        if self.residual is not None or self.factor is not None:
            return None
        if step == "gelu" and not self.gelu:
            return replace(self, gelu=True).tensor()
        if step == "times" and not self.gelu:
            return replace(self, factor=others[0].uop).tensor()
        return replace(self, residual=others[0].uop).tensor() if step == "add" else None

    def tensor(self) -> Tensor | None:
        """The result, computed by one kernel; None if there is no such kernel."""
        a, b = Tensor(self.a), Tensor(self.b)
        lead, rows = a.shape[:-2], math.prod(int(n) for n in (a.shape[:-1] if b.ndim == 2 else a.shape[-2:-1]))
        one = math.prod(int(n) for n in b.shape[:-2]) == 1 and not self.transpose_a
        if self.factor is None and not self.transpose_a and self.transpose_b and rows <= FEW_ROWS:
            out = _few_rows(self)
        elif self.factor is None and self.scales is not None:
            out = _integers(self)
        elif self.scales is not None or self.residual is not None or ((self.gelu or self.factor is not None) and not one):
            return None
        else:
            bias = None if self.bias is None else Tensor(self.bias).cast(dtypes.float32)
            if one:
                a, b = a.reshape(1, -1, a.shape[-1]), b.reshape(1, *b.shape[-2:])
            else:
                b = b.expand(*lead, *b.shape) if b.ndim == 2 else b
                a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
            factor = None if self.factor is None else Tensor(self.factor)
            out = _product(a, b, bias, self.transpose_a, self.transpose_b, self.gelu, factor)
        return made(out.reshape(*lead, -1, out.shape[-1]), self)


def _few_rows(product: Product) -> Tensor:
    """Where a has just been normalised, the same kernel does that, too."""
    a, b = Tensor(product.a), Tensor(product.b)
    norm = maker(a, Normalised) if b.ndim == 2 and a.numel() <= ON_STACK else None
    parts = {"a": product.a, "w": product.b, "scales": product.scales, "bias": product.bias, "residual": product.residual}
    if norm is not None:
        parts |= {"a": norm.x, "norm_weight": norm.weight, "norm_bias": norm.bias}
    inputs = {name: Tensor(part) for name, part in parts.items() if part is not None}
    if b.ndim == 2:
        inputs |= {name: inputs[name].reshape(-1, inputs[name].shape[-1]) for name in ("a", "residual") if name in inputs}
    epsilon = 0.0 if norm is None else norm.epsilon
    return matvec(inputs, product.gelu, epsilon, _fused_gradient(tuple(inputs), product.gelu, epsilon))


def _integers(product: Product) -> Tensor:
    parts = {"a": product.a, "w": product.b, "scales": product.scales, "bias": product.bias, "residual": product.residual}
    inputs = {name: Tensor(part) for name, part in parts.items() if part is not None}
    inputs |= {name: inputs[name].reshape(-1, inputs[name].shape[-1]) for name in ("a", "residual") if name in inputs}
    if "bias" in inputs:
        inputs["bias"] = inputs["bias"].cast(dtypes.float32)
    return integer_product(inputs, product.gelu, _fused_gradient((*inputs, "integers", "their scales"), product.gelu, 0.0))


@functools.cache
def _fused_gradient(names: tuple[str, ...], gelu: bool, epsilon: float) -> Gradient:
    """One kernel for each step back: this is for training on very short inputs, or through integers, which nobody does for long."""

    def gradient(grad_out: UOp, call: UOp) -> tuple[UOp | None, ...]:
        inputs, grad = dict(zip(names, inputs_of(call), strict=True)), Tensor(grad_out)
        a, w = inputs["a"], inputs["w"]
        gradients = {"residual": grad}
        weight = Quantized(w, inputs["scales"], int(a.shape[-1])) if "scales" in inputs else w
        x = layernorm(a, inputs["norm_weight"], inputs.get("norm_bias"), epsilon) if "norm_weight" in inputs else a
        if gelu:
            grad = gelu_gradient(matmul(x, weight, transpose_b=True, bias=inputs.get("bias")), grad)
        gradients["bias"] = sum_rows(grad)
        if isinstance(weight, Tensor):  # nothing is learned by integers
            gradients["w"] = matmul(grad, x, transpose_a=True)
        grad = matmul(grad, weight if isinstance(weight, Tensor) else dequantized(weight))
        if "norm_weight" in inputs:
            grad, gradients["norm_weight"], gradients["norm_bias"], _ = layernorm_gradients(grad, a, inputs["norm_weight"], epsilon)
        gradients["a"] = grad
        return None, *(gradients[name].cast(x.dtype).uop if name in gradients else None for name, x in inputs.items())

    return gradient


def sum_rows(x: Tensor) -> Tensor:
    """The sum over all axes but the last, float32: a bias's gradient; (..., N) -> (N,)."""
    if not (x.dtype == dtypes.float32 and is_fast(x)):
        return x.float().reshape(-1, x.shape[-1]).sum(0)
    *lead, n = (int(size) for size in x.shape)
    rows = math.prod(lead)
    slices = min(-(-n // COLUMNS), slices_for(0.4 * rows * n))
    return Kernel(f"lama_sum_rows_{rows}_{n}", "sum_rows.c", (("ROWS", rows), ("N", n)), slices=slices)((n,), x)


def _product(
    a: Tensor, b: Tensor, bias: Tensor | None, transpose_a: bool, transpose_b: bool, gelu: bool = False, factor: Tensor | None = None
) -> Tensor:
    """(batch, M, K) · (batch, K, N) + (N,) -> (batch, M, N), float32; a and b as stored, before they are transposed.

    With `gelu`, GELU of that, whose slope is kept for the way back; with a `factor` of as many numbers, times these.
    """
    batch, rows, columns = (int(n) for n in a.shape)
    m, k = (columns, rows) if transpose_a else (rows, columns)
    n = int(b.shape[1 if transpose_b else 2])
    form = "nt"[transpose_a] + "nt"[transpose_b]
    # Of a gradient of weights, with its long sum, every part reads a or b anew, or both: few parts.
    parts_m, parts_n, slices = _cut(batch, m, n, k, 1 if transpose_a else PARTS)
    macros = (
        ("PARTS_M", parts_m),
        ("PARTS_N", parts_n),
        ("BATCH", batch),
        ("M", m),
        ("N", n),
        ("K", k),
        ("AMS", 1 if transpose_a else k),
        ("AKS", m if transpose_a else 1),
        ("WKS", 1 if transpose_b else n),
        ("WNS", k if transpose_b else 1),
        ("BIAS", int(bias is not None)),
        ("GELU", int(gelu)),
        ("FACTOR", int(factor is not None)),
        ("WEIGHT", STORED_TYPES[b.dtype]),
        ("W_NARROW", int(b.dtype != dtypes.float32)),
    )
    parts = ["bias"] * (bias is not None) + ["gelu"] * gelu + ["factor"] * (factor is not None)
    name = "_".join((f"lama_matmul_{form}_{batch}_{m}_{n}_{k}_{STORED_TYPES[b.dtype].strip('_').replace(' ', '_')}", *parts))
    kernel = Kernel(name, "matmul.c", macros, operations=2 * batch * m * n * k, slices=slices)
    outputs = [Tensor.empty(batch, m, n, dtype=dtypes.float32, device=a.device) for _ in range(1 + gelu)]
    inputs = [a, b, *(x for x in (bias, factor) if x is not None)]
    gradient = _gradient_for(transpose_a, transpose_b, gelu) if factor is None else None  # it is itself on a way back
    return kernel.into(outputs, *inputs, gradient=gradient)[0]


def _cut(batch: int, m: int, n: int, k: int, parts: int) -> tuple[int, int, int]:
    """Into how many parts to cut the rows and the columns of each of a batch's products, and all of them into how many slices:
    for a long one `parts` for each thread.

    The parts are rather square and none is small.
    """
    nanoseconds = 2 * batch * m * n * k / FLOPS
    wanted = slices_for(nanoseconds)
    if wanted <= batch:
        return 1, 1, wanted
    most = (parts if nanoseconds > SHORT else 1) * threads() if threads() > 1 else 1
    wanted = min(slices_for(nanoseconds / PACKING), most)
    if wanted > threads():  # as many for each
        wanted = -(-wanted // threads()) * threads()
    rows, columns = 1, 1
    for count in range(-(-wanted // batch), 1, -1):
        cuts = [(i, count // i) for i in range(1, count + 1) if count % i == 0 and _are_large(m, i) and _are_large(n, count // i)]
        if cuts:  # the squarest reads the least of a and b
            rows, columns = min(cuts, key=lambda cut: m / cut[0] + n / cut[1])
            break
    return rows, columns, batch * rows * columns if batch == 1 else min(wanted, batch * rows * columns)


def _are_large(size: int, parts: int) -> bool:
    return parts == 1 or size // parts >= SMALL


@functools.cache
def _gradient_for(transpose_a: bool, transpose_b: bool, gelu: bool) -> Gradient:
    """d(ab + bias) = da·b + a·db + dbias: two more products, whichever way a and b are stored, and a sum."""

    def gradient(grad_out: UOp, call: UOp) -> tuple[UOp | None, ...]:
        (a, b, *bias), grad = (Tensor(u) for u in call.src[2 + gelu :]), Tensor(grad_out)
        if gelu:
            grad = _times(grad, Tensor(call.src[2].after(call)))
        grad_a = matmul(b, grad, transpose_b, True) if transpose_a else matmul(grad, b, False, not transpose_b)
        grad_b = matmul(grad, a, True, transpose_a) if transpose_b else matmul(a, grad, not transpose_a, False)
        return *[None] * (1 + gelu), grad_a.cast(a.dtype).uop, grad_b.cast(b.dtype).uop, *(sum_rows(grad).uop for _ in bias)

    return gradient


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor, stored; two tensors of one shape."""
    product = then(x, "times", factor)
    return (x * factor).contiguous() if product is None else product
