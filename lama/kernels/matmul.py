"""Matrix products on the CPU: one C kernel, compiled for each shape, behind the same function as its plain twin.

tinygrad's own schedule for a product reaches a twentieth of what a CPU core can do. On the CPU device `matmul` runs
`matmul.c` instead, with its two gradients as products of the same kind; everywhere else, for other dtypes, for shapes
that are not plain numbers, and with LAMA_REFERENCE=1 in the environment, it is tinygrad's `@`.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

WEIGHT_TYPES = {dtypes.float32: "float", dtypes.float16: "_Float16", dtypes.bfloat16: "unsigned short"}


def matmul(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """a · b over the last two axes, each of them transposed first where asked; (..., M, K) · (..., K, N) -> (..., M, N).

    Either both have the same leading axes, or b has none and serves them all. The result has a's dtype; b may be
    stored in half precision, and is widened as it is read.
    """
    if not _is_fast(a, b):
        return (a.transpose(-2, -1) if transpose_a else a) @ (b.transpose(-2, -1) if transpose_b else b).cast(a.dtype)
    lead = a.shape[:-2]
    if b.ndim == 2 and not transpose_a:
        out = _product(a.reshape(1, -1, a.shape[-1]), b.reshape(1, *b.shape), False, transpose_b)
    else:
        if b.ndim == 2:
            b = b.expand(*lead, *b.shape)
        out = _product(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), transpose_a, transpose_b)
    return out.reshape(*lead, -1, out.shape[-1])


def _is_fast(a: Tensor, b: Tensor) -> bool:
    return (
        isinstance(a.device, str)
        and a.device.split(":")[0] == "CPU"
        and a.dtype == dtypes.float32
        and b.dtype in WEIGHT_TYPES
        and all(isinstance(n, int) for n in (*a.shape, *b.shape))
        and (b.ndim == 2 or a.shape[:-2] == b.shape[:-2])
        and not _reference()
        and _compiles_c(a.device)
    )


@functools.cache
def _reference() -> bool:
    return os.environ.get("LAMA_REFERENCE", "") not in ("", "0")


@functools.cache
def _compiles_c(device: str) -> bool:
    """Whether the device compiles C; LLVM and other renderers do not."""
    return type(Device[device].renderer).__name__ == "ClangRenderer"


@dataclass(frozen=True)
class Product:
    """The shape of one batched product, as the C source needs it."""

    batch: int
    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool
    weight: DType

    @property
    def name(self) -> str:
        form = "nt"[self.transpose_a] + "nt"[self.transpose_b]
        return f"lama_matmul_{form}_{self.batch}_{self.m}_{self.n}_{self.k}_{self.weight.name.replace(' ', '_')}"

    def source(self) -> str:
        macros = {
            "NAME": self.name,
            "BATCH": self.batch,
            "M": self.m,
            "N": self.n,
            "K": self.k,
            "AMS": 1 if self.transpose_a else self.k,
            "AKS": self.m if self.transpose_a else 1,
            "WKS": 1 if self.transpose_b else self.n,
            "WNS": self.k if self.transpose_b else 1,
            "WEIGHT": WEIGHT_TYPES[self.weight],
            "W_IS_HALF": int(self.weight == dtypes.float16),
            "W_IS_BFLOAT16": int(self.weight == dtypes.bfloat16),
        }
        text = resources.files("lama.kernels").joinpath("matmul.c").read_text()
        return "".join(f"#define {key} {value}\n" for key, value in macros.items()) + text


def _product(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    """(batch, M, K) · (batch, K, N) -> (batch, M, N), float32; a and b as stored, before they are transposed."""
    batch, m, k = (a.shape[0], a.shape[2], a.shape[1]) if transpose_a else a.shape
    n, k_b = (b.shape[1], b.shape[2]) if transpose_b else (b.shape[2], b.shape[1])
    if k != k_b:
        raise ValueError(f"the inner sizes of a product must agree; got {a.shape} and {b.shape}")
    product = Product(batch, m, n, k, transpose_a, transpose_b, b.dtype)  # type: ignore[arg-type]
    out = Tensor.empty(batch, m, n, device=a.device)
    program, gradient = functools.partial(_program, product, str(a.device)), _gradient_for(transpose_a, transpose_b)
    return Tensor.custom_kernel(out, a.contiguous(), b.contiguous(), fxn=program, grad_fxn=gradient)[0]


@functools.cache
def _compile(product: Product, device: str) -> tuple[str, bytes]:
    source = product.source()
    return source, Device[device].compiler.compile_cached(source)


def _program(product: Product, device: str, *buffers: UOp) -> UOp:
    source, binary = _compile(product, device)
    operations = 2 * product.batch * product.m * product.n * product.k
    sink = UOp.sink(*(b.base for b in buffers), arg=KernelInfo(product.name, estimates=Estimates(ops=operations)))
    info = ProgramInfo(product.name, (1, 1, 1), (1, 1, 1), globals=(0, 1, 2), outs=(0,), ins=(1, 2), target=Device[device].renderer.target)
    parts = (sink, UOp(Ops.LINEAR, src=(*sink.src, sink)), UOp(Ops.SOURCE, arg=source), UOp(Ops.BINARY, arg=binary))
    return UOp(Ops.PROGRAM, src=parts, arg=info)


@functools.cache
def _gradient_for(transpose_a: bool, transpose_b: bool) -> Callable[[UOp, UOp], tuple[UOp | None, ...]]:
    """d(ab) = da·b + a·db: two more products, whichever way a and b are stored. One object a form: tinygrad hashes it."""

    def gradient(grad_out: UOp, call: UOp) -> tuple[UOp | None, ...]:
        a, b, grad = Tensor(call.src[2]), Tensor(call.src[3]), Tensor(grad_out)
        grad_a = matmul(b, grad, transpose_b, True) if transpose_a else matmul(grad, b, False, not transpose_b)
        grad_b = matmul(grad, a, True, transpose_a) if transpose_b else matmul(a, grad, not transpose_a, False)
        return None, grad_a.cast(a.dtype).uop, grad_b.cast(b.dtype).uop

    return gradient
