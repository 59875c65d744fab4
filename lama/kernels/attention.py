"""Attention without the T x S matrix of scores: attention.c computes it and its gradients in blocks.

q, k and v may be views, such as a head's part of one projection: the kernels read them in place.
"""

import functools
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.host import may_use_amx
from lama.kernels.dropout import threshold
from lama.kernels.matmul import reduced_precision
from lama.runtime.kernel import (
    C_TYPES,
    Gradient,
    Gradients,
    Macros,
    c_float,
    inputs_of,
    is_fast,
    make_kernel,
    result_of,
    slices_for,
)
from lama.runtime.strides import Layout, contiguous_strides, materialise, partitions, shape_of, strided_view
from lama.runtime.threads import threads

WIDEST = 256  # numbers of a head: blocks of wider heads would not fit on the stack of a thread
FLOPS = 70  # floating-point operations of a core in a nanosecond, roughly
PARTS = 2  # parts of the work for each thread, if there are fewer heads
FEW_QUERIES = 4  # with no more queries than this, the keys and values are read once, in order
FEW_SUMS = 8  # queries of all heads that share keys: their sums fit into registers
BANDWIDTH = 10  # bytes that a core reads from memory in a nanosecond, roughly
HEADERS = "amx.h", "bfloat16.h"
FEWEST_QUERIES = 64  # of a part, since each part makes its own copy of the keys and values


@dataclass(frozen=True)
class _AttentionSpec:
    """All constants of a kernel: B·H heads of T queries and S keys of D numbers, values of E numbers."""

    B: int
    H: int
    T: int
    S: int
    D: int
    E: int
    layouts: tuple[Layout, ...]
    """Shapes of q, k and v, each (B, H or H / group, T or S, D or E)."""
    owners: tuple[int, ...]
    """A number for each of q, k and v: equal numbers mean views of the same tensor."""
    scale: float
    offset: int | None = 0
    """Causal: query t sees the keys up to offset + t. None: all keys."""
    padding: bool = False
    rate: float = 0.0
    site: int = 0
    group: int = 1
    """Heads of q for each head of k and v."""
    window: int = 0
    """Causal: keys that a query sees at most; 0 for all."""
    starts: bool = False
    """Causal: each query has a first key that it sees."""
    bfloat16: bool = False
    """Whether the factors of products are rounded to bfloat16."""

    @property
    def label(self) -> str:
        extra = f"_group{self.group}" if self.group > 1 else ""
        extra += f"_w{self.window}" if self.window else ""
        extra += ("_starts" if self.starts else "") + ("_bfloat16" if self.bfloat16 else "")
        return f"{self.B}_{self.H}_{self.T}_{self.S}_{self.D}_{self.E}{extra}"

    @property
    def products(self) -> int:
        """The number of scores that a causal mask leaves, times D + E: multiplications of both products."""
        seen = self.T * self.S
        if self.offset is not None and not self.padding:
            most = min(self.S, self.window or self.S)
            seen = sum(min(most, self.offset + t + 1) for t in range(self.T))
        return self.B * self.H * seen * (self.D + self.E)

    def sizes(self) -> Macros:
        """The macros of both C files."""
        macros: Macros = {"B": self.B, "H": self.H, "T": self.T, "S": self.S, "D": self.D}
        for name, layout in zip("QKV", self.layouts, strict=True):
            macros[f"{name}_AT"] = f"{layout.offset}L"
            for axis, stride in zip("BHT", layout.strides, strict=False):
                macros[f"{name}{axis}"] = f"{stride}L"
        return {
            **macros,
            "SCALE": c_float(self.scale),
            "GROUP": self.group,
            "KV_HEADS": self.H // self.group,
            "WINDOW": self.window,
        }

    def macros(self, backward: bool = False, cached: bool = False) -> Macros:
        """The macros of attention.c."""
        macros = {
            **self.sizes(),
            "E": self.E,
            "CAUSAL": self.offset is not None,
            "OFFSET": self.offset or 0,
            "PADDING": self.padding,
            "STARTS": self.starts,
            "DROP": self.rate > 0,
            "BACKWARD": backward,
            "CACHED": cached,
            "KV": "float",
            "IN_ROWS": False,
            "BFLOAT16": self.bfloat16,
            "AMX": self.bfloat16 and may_use_amx(),
        }
        if self.rate > 0:
            macros |= {"THRESHOLD": f"{threshold(self.rate)}u", "SITE": f"{self.site}u"}
            macros["DROP_SCALE"] = c_float(1 / (1 - self.rate))
        return macros


def _supports(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> bool:
    """Whether the kernel supports these: float32, (..., T or S, d), with the same one or two leading axes."""
    tensors = (q, k, v)
    extras = [] if padding is None else [padding]
    return (
        all(
            t.ndim == q.ndim in (3, 4) and t.shape[0] == q.shape[0] and t.dtype == dtypes.float32
            for t in tensors
        )
        and k.shape[:-2] == v.shape[:-2]
        and (q.ndim == 3 or int(q.shape[1]) % int(k.shape[1]) == 0)
        and is_fast(*tensors, *extras)
        and q.shape[-1] == k.shape[-1]
        and k.shape[-2] == v.shape[-2]
        and max(int(q.shape[-1]), int(v.shape[-1])) <= WIDEST
        and all(t.shape in ((1, 1, 1, k.shape[-2]), (q.shape[0], 1, 1, k.shape[-2])) for t in extras)
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    offset: int | None = None,
    padding: Tensor | None = None,
    rate: float = 0.0,
    key: Tensor | None = None,
    site: int = 0,
    window: int = 0,
    starts: Tensor | None = None,
) -> Tensor | None:
    """`ops.attention` by a kernel without a matrix of scores, or None.

    The result has the memory layout (B, T, H, e). Source: Dao et al. 2022, algorithm 2.
    """
    if window >= int(k.shape[-2]):
        window = 0
    if not (_supports(q, k, v, padding) and (offset is None or offset >= 0)):
        return None
    if (window or starts is not None) and (offset is None or padding is not None):
        return None
    if starts is not None and (starts.shape != (q.shape[0], q.shape[-2]) or not is_fast(starts)):
        return None
    if q.ndim == 3:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        z = attention(q, k, v, scale, offset, padding, rate, key, site, window, starts)
        return None if z is None else z.squeeze(1)
    (B, H, T, D), (S, E) = shape_of(q), shape_of(v)[-2:]
    bases, layouts, owners = _bases_and_layouts(q, k, v)
    if rate == 0 or key is None:
        rate, key, site = 0.0, None, 0
    group = H // int(k.shape[1])
    has_padding, has_starts = padding is not None, starts is not None
    sizes = (B, H, T, S, D, E, layouts, owners)
    rounds = reduced_precision() == dtypes.bfloat16
    spec = _AttentionSpec(*sizes, scale, offset, has_padding, rate, site, group, window, has_starts, rounds)
    if padding is not None:
        bases.append(padding.cast(dtypes.bool).reshape(-1, S).expand(B, S))
    if starts is not None:
        bases.append(starts.cast(dtypes.int32))
    if key is not None:
        bases.append(key)
    outputs = [Tensor.empty(B, T, H, E, device=q.device), Tensor.empty(B, H, T, 2, device=q.device)]
    parts, slices = _tiling(spec)
    macros, operations = {**spec.macros(), "PARTS": parts}, 2 * spec.products
    kernel = make_kernel(
        "attention.c", macros, label=spec.label, operations=operations, slices=slices, headers=HEADERS
    )
    return kernel.into(outputs, *bases, gradient=_gradient_for(spec))[0].permute(0, 2, 1, 3)


def attention_in_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int = 0,
) -> Tensor | None:
    """`ops.attention_in_cache` by a kernel, in the layout (B, T, H, d), or None."""
    numbers = [positions] if rows is None else [positions, rows]
    if not (is_fast(q, keys, *numbers) and keys.dtype in C_TYPES):
        return None
    (B, H, T, D), S, type_ = shape_of(q), int(keys.shape[2]), C_TYPES[keys.dtype]
    window = window if window < S else 0
    group = H // int(keys.shape[1])
    if T > S or D > WIDEST:
        return None
    found = [_with_rows(t.float()) for t in (q, k, v)]
    inputs = [*(base for base, _ in found), *numbers]
    layouts = tuple(layout for _, layout in found)
    spec = _AttentionSpec(B, H, T, S, D, D, layouts, (0, 1, 2), scale, group=group, window=window)
    macros: Macros = {"KV": type_, "IN_ROWS": rows is not None}
    label = f"{spec.label}_{type_}{'' if rows is None else '_rows'}"
    outputs = [Tensor.empty(B, T, H, D, device=q.device), keys, values]
    few = T <= FEW_QUERIES if group == 1 else T * group <= FEW_SUMS
    if few:
        macros, operations = {**spec.sizes(), **macros}, 4 * B * H * T * S * D
        heads = B * H // group
        slices = min(heads, slices_for(2 * heads * S * D * keys.dtype.itemsize / BANDWIDTH))
        file = "attention_step.c"
    else:
        outputs.insert(1, Tensor.empty(B, H, T, 2, device=q.device))
        parts, slices = _tiling(spec)
        macros, operations = {**spec.macros(cached=True), **macros, "PARTS": parts}, 2 * spec.products
        label = f"cached_{label}"
        file = "attention.c"
    headers = ("cache.h",) if few else (*HEADERS, "cache.h")
    made = functools.partial(make_kernel, label=label, operations=operations, in_place=True, headers=headers)
    kernel = made(file, macros, slices=slices)
    return kernel.into(outputs, *inputs)[0].permute(0, 2, 1, 3)


def _tiling(spec: _AttentionSpec) -> tuple[int, int]:
    """The number of parts of each head's queries, and of slices for the parts of all heads."""
    heads, nanoseconds = spec.B * spec.H, 2 * spec.products / FLOPS
    wanted = min(slices_for(nanoseconds), PARTS * threads() if threads() > 1 else 1)
    parts = 1
    while heads * parts < wanted and 2 * parts * FEWEST_QUERIES <= spec.T:
        parts *= 2
    return parts, min(heads * parts, slices_for(nanoseconds))


def _with_rows(x: Tensor) -> tuple[Tensor, Layout]:
    """`strided_view`, of a copy if the numbers of the last axis are not consecutive in memory."""
    base, layout = strided_view(x)
    if layout.strides[-1] == 1 or layout.shape[-1] == 1:
        return base, layout
    return x.contiguous(), Layout(layout.shape, 0, contiguous_strides(layout.shape))


def _bases_and_layouts(
    q: Tensor, k: Tensor, v: Tensor
) -> tuple[list[Tensor], tuple[Layout, ...], tuple[int, ...]]:
    """The tensor that each of q, k and v is a view of, its layout there, and the index of its first view.

    Views that do not partition their tensor are copied: their gradients would not make up the tensor's.
    """
    found = [strided_view(t) for t in (q, k, v)]
    bases: list[Tensor] = []
    layouts: list[Layout] = []
    owners: list[int] = []
    for i, (t, (base, layout)) in enumerate(zip((q, k, v), found, strict=True)):
        same = [j for j, (other, _) in enumerate(found) if other.uop is base.uop]
        views = tuple(found[j][1] for j in same)
        has_rows = all(view.strides[-1] in (0, 1) for view in views)
        if has_rows and partitions(int(base.numel()), views):
            bases.append(base)
            layouts.append(layout)
            owners.append(same[0])
        else:
            bases.append(materialise(t))
            layouts.append(Layout(layout.shape, 0, contiguous_strides(layout.shape)))
            owners.append(i)
    return bases, tuple(layouts), tuple(owners)


@functools.cache
def _gradient_for(spec: _AttentionSpec) -> Gradient:
    """The gradients of q, k and v, written in the layout of these in their tensors."""
    firsts = sorted(set(spec.owners))
    places = zip("QKV", spec.owners, strict=True)
    macros = spec.macros(backward=True) | {f"D{name}": f"d{owner}" for name, owner in places}
    macros["OUTPUTS"] = ", ".join(f"output d{owner}" for owner in firsts)
    label, operations = f"backward_{spec.label}", 5 * spec.products
    slices = min(spec.B * spec.H // spec.group, slices_for(operations / FLOPS))
    kernel = make_kernel(
        "attention.c", macros, label=label, operations=operations, slices=slices, headers=HEADERS
    )

    def gradient(grad: UOp, call: UOp) -> Gradients:
        z, stats, inputs = result_of(call), result_of(call, 1), inputs_of(call, 2)
        q, k, v, *extras = inputs
        outputs = [Tensor.empty(*inputs[owner].shape, device=q.device) for owner in firsts]
        written = kernel.into(outputs, q, k, v, z, Tensor(grad), stats, *extras)
        found = {owner: t.uop for owner, t in zip(firsts, written, strict=True)}
        return None, None, *(found.get(i) for i in range(len(inputs)))

    return gradient
