"""Attention without the T x S matrix of scores: attention.c makes it and its gradients a block at a time, from q, k and v as they lie."""

import functools
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.dropout import threshold
from lama.kernels.matmul import factors_are_rounded
from lama.kernels.pool import threads
from lama.kernels.program import STORED_TYPES, Gradient, Kernel, is_fast, slices_for
from lama.kernels.views import Layout, contiguous_strides, covers, stored, view

WIDEST = 256  # numbers of a head: blocks of wider ones would not fit the stack of a thread
FLOPS = 70  # floating-point operations that a core does in a nanosecond, about
PARTS = 2  # for each thread, where there are fewer heads
FEW_QUERIES = 4  # up to so many, the keys and values are read once, in order
ON_STACK = 32768  # floats that a slice keeps on its stack
BANDWIDTH = 10  # bytes that a core reads from memory in a nanosecond, about
FEWEST_QUERIES = 64  # of a part: each part copies the keys and values for itself


@dataclass(frozen=True)
class _Form:
    """All that a kernel is compiled for: T queries and S keys of D numbers, values of E; where q, k and v lie, and in which inputs."""

    B: int
    H: int
    T: int
    S: int
    D: int
    E: int
    layouts: tuple[Layout, ...]
    """Of q, k and v, each (B, H, T or S, D or E)."""
    owners: tuple[int, ...]
    """Of q, k and v: equal numbers are views of one tensor."""
    scale: float
    offset: int | None
    """Causal: query t sees the keys up to offset + t. None: all keys."""
    padding: bool
    rate: float
    site: int

    @property
    def name(self) -> str:
        return f"{self.B}_{self.H}_{self.T}_{self.S}_{self.D}_{self.E}"

    @property
    def products(self) -> int:
        """Numbers of the scores, times D + E: what one product for each costs. A causal mask spares some."""
        seen = self.T * self.S
        if self.offset is not None and not self.padding:
            seen = sum(min(self.S, self.offset + t + 1) for t in range(self.T))
        return self.B * self.H * seen * (self.D + self.E)

    def macros(self, kind: str) -> tuple[tuple[str, str | int], ...]:
        """Of the kernel FORWARD, BACKWARD or CACHED."""
        dropped = (("THRESHOLD", f"{threshold(self.rate)}u"), ("DROP_SCALE", f"(float){1 / (1 - self.rate)!r}"), ("SITE", f"{self.site}u"))
        return (
            *((name, int(getattr(self, name))) for name in "BHTSDE"),
            *_places(self.layouts),
            ("SCALE", f"(float){self.scale!r}"),
            ("CAUSAL", int(self.offset is not None)),
            ("OFFSET", self.offset or 0),
            ("PADDING", int(self.padding)),
            ("DROP", int(self.rate > 0)),
            *(dropped if self.rate > 0 else ()),
            ("BACKWARD", int(kind == "BACKWARD")),
            ("CACHED", int(kind == "CACHED")),
        )


def _places(layouts: tuple[Layout, ...]) -> tuple[tuple[str, str], ...]:
    """Where q, k and v lie, as macros."""
    return tuple(
        (f"{name}{kind}", f"{number}L")
        for name, layout in zip("QKV", layouts, strict=True)
        for kind, number in zip(("_AT", "B", "H", "T"), (layout.offset, *layout.strides[:3]), strict=True)
    )


def attends(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> bool:
    """Whether `attention` serves these: float32, axes (..., T or S, d) with one or two leading ones, the same for all."""
    tensors = (q, k, v)
    return (
        all(t.ndim in (3, 4) and t.shape[:-2] == q.shape[:-2] and t.dtype == dtypes.float32 for t in tensors)
        and is_fast(*tensors, *([] if padding is None else [padding]))
        and q.shape[-1] == k.shape[-1]
        and k.shape[-2] == v.shape[-2]
        and max(int(q.shape[-1]), int(v.shape[-1])) <= WIDEST
        and (padding is None or padding.shape in ((1, 1, 1, k.shape[-2]), (q.shape[0], 1, 1, k.shape[-2])))
        and not factors_are_rounded()
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
) -> Tensor:
    """dropout(softmax(q kᵀ · scale)) v: (B, H, T, d), (B, H, S, d), (B, H, S, e) -> (B, H, T, e), or without the axis H.

    With an `offset` of at least 0, query t sees the keys up to offset + t; of these, with `padding` (B or 1, 1, 1, S), only the
    True ones. A query that sees nothing gets the mean of all values. The result is stored as (B, T, H, e). `rate`, `key` and
    `site` are those of `dropout`. For what `attends` says yes to. Source: Dao et al. 2022, algorithm 2.
    """
    if q.ndim == 3:
        return attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale, offset, padding, rate, key, site).squeeze(1)
    (B, H, T, D), (S, E) = (int(n) for n in q.shape), (int(n) for n in v.shape[-2:])
    bases, layouts, owners = _together(q, k, v)
    drop = rate > 0 and key is not None
    form = _Form(B, H, T, S, D, E, layouts, owners, scale, offset, padding is not None, rate if drop else 0.0, site if drop else 0)
    seen = [] if padding is None else [padding.cast(dtypes.bool).reshape(-1, S).expand(B, S)]
    extras = [*seen, *([key] if drop and key is not None else [])]
    outputs = [Tensor.empty(*shape, device=q.device) for shape in ((B, T, H, E), (B, H, T, 2))]
    parts, slices = _cut(form)
    macros = (*form.macros("FORWARD"), ("KV", "float"), ("PARTS", parts))
    kernel = Kernel(f"lama_attention_{form.name}", "attention.c", macros, operations=2 * form.products, slices=slices)
    return kernel.into(outputs, *bases, *extras, gradient=_gradient_for(form))[0].permute(0, 2, 1, 3)


def attends_in(keys: Tensor, n: int) -> bool:
    """Whether `attention_in_cache` serves n queries, and caches like this one of keys (B, H, S, d)."""
    return is_fast(keys) and keys.dtype in STORED_TYPES and n <= int(keys.shape[2]) and int(keys.shape[3]) <= WIDEST


def attention_in_cache(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """Writes k and v, (B, H, T, d), into the stored tensors `keys` and `values`, (B, H, S, d) of any stored type, from `position` on,
    a stored int32 of shape (1,); then softmax(q kᵀ · scale) v, where query t sees all keys up to position + t: (B, H, T, d).

    `position` + T must be at most S. The result is stored as (B, T, H, d), and has no gradient. For what `attends_in` says yes to.
    """
    (B, H, T, D), S, type_ = (int(n) for n in q.shape), int(keys.shape[2]), STORED_TYPES[keys.dtype]
    found = [_with_rows(t.float()) for t in (q, k, v)]
    layouts = tuple(layout for _, layout in found)
    inputs = [*(base for base, _ in found), position]
    form = _Form(B, H, T, S, D, D, layouts, (0, 1, 2), scale, 0, False, 0.0, 0)
    name = f"{form.name}_{type_.strip('_').replace(' ', '_')}"
    z = Tensor.empty(B, T, H, D, device=q.device)
    if T <= FEW_QUERIES and T * S <= ON_STACK:
        macros: tuple[tuple[str, str | int], ...] = (
            *((n, int(getattr(form, n))) for n in "BHTSD"),
            *_places(layouts),
            ("SCALE", f"(float){scale!r}"),
            ("KV", type_),
        )
        macros = (*macros, ("KV_IS_FLOAT", int(type_ == "float")))
        slices = min(B * H, slices_for(2 * B * H * S * D * keys.dtype.itemsize / BANDWIDTH))
        kernel = Kernel(f"lama_attention_step_{name}", "attention_step.c", macros, 4 * B * H * T * S * D, slices, in_place=True)
        z = kernel.into([z, keys, values], *inputs)[0]
    else:
        parts, slices = _cut(form)
        macros = (*form.macros("CACHED"), ("KV", type_), ("PARTS", parts))
        kernel = Kernel(f"lama_attention_cached_{name}", "attention.c", macros, 2 * form.products, slices, in_place=True)
        z = kernel.into([z, Tensor.empty(B, H, T, 2, device=q.device), keys, values], *inputs)[0]
    return z.permute(0, 2, 1, 3)


def _cut(form: _Form) -> tuple[int, int]:
    """In how many parts to cut each head's queries, and in how many slices the parts of all heads."""
    heads, nanoseconds = form.B * form.H, 2 * form.products / FLOPS
    wanted = min(slices_for(nanoseconds), PARTS * threads() if threads() > 1 else 1)
    parts = 1
    while heads * parts < wanted and 2 * parts * FEWEST_QUERIES <= form.T:
        parts *= 2
    return parts, min(heads * parts, slices_for(nanoseconds))


def _with_rows(x: Tensor) -> tuple[Tensor, Layout]:
    """x as `view` has it, copied where the numbers of its last axis do not follow one another."""
    base, layout = view(x)
    if layout.strides[-1] == 1 or layout.shape[-1] == 1:
        return base, layout
    return x.contiguous(), Layout(layout.shape, 0, contiguous_strides(layout.shape))


def _together(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], tuple[Layout, ...], tuple[int, ...]]:
    """The stored tensor that each of these is a view of, how it lies there, and which of them is the first in that tensor.

    Views that do not cover a tensor, each number once, are copied: their gradients would not make up the tensor's.
    """
    found = [view(t) for t in (q, k, v)]
    bases: list[Tensor] = []
    layouts: list[Layout] = []
    owners: list[int] = []
    for i, (t, (base, layout)) in enumerate(zip((q, k, v), found, strict=True)):
        same = [j for j, (other, _) in enumerate(found) if other.uop is base.uop]
        views = tuple(found[j][1] for j in same)
        in_place = covers(int(base.numel()), views) and all(other.strides[-1] in (0, 1) for other in views)
        bases.append(base if in_place else stored(t))
        layouts.append(layout if in_place else Layout(layout.shape, 0, contiguous_strides(layout.shape)))
        owners.append(same[0] if in_place else i)
    return bases, tuple(layouts), tuple(owners)


@functools.cache
def _gradient_for(form: _Form) -> Gradient:
    """The gradients of q, k and v, written as these lie in their tensors."""
    firsts = sorted(set(form.owners))
    macros = (
        *form.macros("BACKWARD"),
        ("KV", "float"),
        ("OUTPUTS", len(firsts)),
        *((f"D{name}", f"d{firsts.index(owner) + 1}") for name, owner in zip("QKV", form.owners, strict=True)),
    )
    nanoseconds = 5 * form.products / FLOPS
    kernel = Kernel(
        f"lama_attention_backward_{form.name}",
        "attention.c",
        macros,
        operations=5 * form.products,
        slices=min(form.B * form.H, slices_for(nanoseconds)),
    )

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        z, stats = (Tensor(source.after(call)) for source in call.src[1:3])
        q, k, v, *extras = (Tensor(source) for source in call.src[3:])
        outputs = [Tensor.empty(*(q, k, v)[owner].shape, device=q.device) for owner in firsts]
        found = dict(zip(firsts, kernel.into(outputs, q, k, v, z, Tensor(grad), stats, *extras), strict=True))
        return None, None, *(found[i].uop if i in found else None for i in range(3)), *(None for _ in extras)

    return gradient
