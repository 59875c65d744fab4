"""Same bits: a token's logits, keys and values depend on no batch, no chunks of its prompt, no threads."""

from collections.abc import Iterator

import numpy as np
import pytest
from helpers import normal, tiled
from test_kernels import needs_c, ran  # noqa: F401  (a fixture)
from test_quantized import with_minima
from test_runtime_threads import run_on
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_parameters

from lama import kernels
from lama.generation import Runner
from lama.generation.exact import exact_obstacle
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import matrices_of, set_weight
from lama.ops import add, gelu, layernorm, matmul, quantize
from lama.runtime import kernel as program

pytestmark = needs_c

SIZES = {"vocab_size": 83, "context_length": 80, "d_model": 72, "n_layers": 2, "n_heads": 6, "d_mlp": 100}
LLAMA = {
    "n_kv_heads": 2, "bias": False, "tied": False, "activation": "silu", "gated": True, "norm_kind": "rms",
    "positions": "rope",
}  # fmt: skip
MODELS: dict[str, dict] = {
    "gpt2": {},
    "llama": LLAMA,
    "neox": {"positions": "rope", "d_rotated": 4, "layout": "parallel", "activation": "gelu"},
    "gemma3": {
        **LLAMA, "d_head": 20, "windows": (9, 0), "norm": "sandwich", "qk_norm": "head",
        "activation": "gelu_new", "logit_cap": 3.0, "embed_scale": 7.0, "tied": True,
    },
}  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16", "int8", "int4", "int4 minima", "int4 blocks")
TEXT = np.random.default_rng(5).integers(0, 83, 61)
State = list[np.ndarray]


def make(name: str, dtype: str = "float32") -> GPT:
    model = GPT(GPTConfig(**(SIZES | MODELS[name])))
    for i, parameter in enumerate(get_parameters(model)):
        parameter.assign(Tensor(normal(*parameter.shape, seed=i) / 4)).realize()
    if dtype in ("float16", "bfloat16"):
        for parameter in get_parameters(model):
            parameter.replace(parameter.cast(getattr(dtypes, dtype)).contiguous().realize())
        for layer in matrices_of(model).values():
            layer.weight.replace(tiled(layer.weight))
    elif dtype != "float32":
        for path, layer in matrices_of(model).items():
            d_out, d_in = (int(n) for n in layer.weight.shape)
            if " " in dtype and not path.startswith("embed"):
                set_weight(model, path, with_minima(d_out, d_in, 4, dtype.endswith("blocks"))[0])
            else:
                set_weight(model, path, quantize(layer.weight, int(dtype[3])))
        Tensor.realize(*get_parameters(model))
    return model


def state_of(runner: Runner, row: int, logits: np.ndarray) -> State:
    """The logits, and what the cache has for the text, which that row of the batch was fed."""
    caches = [*runner.cache.keys, *runner.cache.values]
    return [logits, *(cache[row, :, : len(TEXT)].float().numpy() for cache in caches)]


def in_chunks(model: GPT, *ends: int, batch: int = 1, jit: bool = True) -> State:
    """The state after chunks of the text up to these ends; tokens that come alone are decoded."""
    runner, start, row = Runner(model, batch, jit=jit), 0, batch - 1
    others = np.random.default_rng(batch).integers(0, 83, (batch, len(TEXT)))
    others[row] = TEXT
    for end in [*ends, len(TEXT)]:
        if batch > 1 and start == 0:
            logits = runner.prefill(others[:, :end])[row]
        elif end - start == 1:
            logits = runner.decode(others[:, start])[row]
        else:
            logits = runner.feed(np.array([row]), TEXT[None, start:end])[0]
        start = end
    return state_of(runner, row, logits)


def assert_same(found: State, expected: State, what: object) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32), f"{what}, array {i}")


CASES = [
    ("gpt2", "float32"),
    ("gpt2", "bfloat16"),
    ("gpt2", "int4"),
    ("llama", "float32"),
    ("llama", "int8"),
    ("llama", "int4 minima"),
    ("neox", "float16"),
    ("gemma3", "float32"),
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_and_cache_have_the_same_bits_however_a_text_is_fed(name, dtype):
    model = make(name, dtype)
    assert exact_obstacle(model) is None
    whole, n = in_chunks(model), len(TEXT)
    assert np.isfinite(whole[0]).all() and whole[0].std() > 0.01
    assert_same(in_chunks(model, 3, 14, 25), whole, "chunks")
    assert_same(in_chunks(model, *range(1, n)), whole, "token by token")
    assert_same(in_chunks(model, 14, *range(50, n), batch=9), whole, "a batch of 9")


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "float32"), ("llama", "int4 minima")])
def test_logits_and_cache_have_the_same_bits_in_any_batch_and_for_any_threads(monkeypatch, name, dtype):
    model = make(name, dtype)
    whole = in_chunks(model)
    for batch in (2, 3, 8, 17):
        assert_same(in_chunks(model, 14, *range(56, 61), batch=batch), whole, f"a batch of {batch}")
    for threads in (1, 2):
        run_on(monkeypatch, threads)
        assert_same(in_chunks(model, 14, *range(56, 61)), whole, f"{threads} threads")


@pytest.fixture(params=[8, 4])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The kernels as a machine with vectors of so many floats compiles them."""
    source = program.Kernel.source
    program._program.cache_clear()
    monkeypatch.setattr(
        program.Kernel, "source", lambda kernel: f"#define V {request.param}\n" + source(kernel)
    )
    yield request.param
    program._program.cache_clear()


@pytest.mark.parametrize(
    ("name", "dtype"), [("gemma3", "float32"), ("llama", "bfloat16"), ("llama", "int8"), ("gpt2", "int4")]
)
def test_logits_and_cache_have_the_same_bits_on_narrower_machines(narrow, name, dtype):
    model = make(name, dtype)
    whole = in_chunks(model, jit=False)
    assert_same(in_chunks(model, 14, 58, 59, 60, jit=False), whole, "chunks")
    assert_same(in_chunks(model, 14, 60, batch=3, jit=False), whole, "a batch of 3")


# --- the kernels, at sizes beyond those of the models: sums in several pieces


def weights(n: int, k: int, dtype: str) -> Tensor | kernels.Quantized:
    if " " in dtype:
        return with_minima(n, k, 4, dtype.endswith("blocks"))[0]
    w = Tensor(normal(n, k)).realize()
    if "int" in dtype:
        return quantize(w, int(dtype[3]))
    return w.cast(getattr(dtypes, dtype)).contiguous().realize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "steps"), [(37, 1601, "norm gelu add"), (131, 200, "")])
def test_a_row_of_a_product_has_the_same_bits_among_any_number_of_rows(dtype, n, k, steps):
    if "blocks" in dtype:
        k = -(-k // 256) * 256
    w, bias, norm = weights(n, k, dtype), Tensor(normal(n)).realize(), Tensor(normal(k)).realize()
    x, residual = normal(33, k, seed=2), normal(33, n, seed=3)

    def outcome(rows: int) -> np.ndarray:
        a, r = Tensor(x[:rows]).realize(), Tensor(residual[:rows]).realize()
        if not steps:
            return matmul(a, w, transpose_b=True).numpy()
        y = layernorm(a, norm, None, 1e-5)
        return add(r, gelu(matmul(y, w, transpose_b=True, bias=bias))).numpy()

    expected = outcome(33)
    for rows in (1, 5, 8, 9, 24, 25):
        assert_same([outcome(rows)], [expected[:rows]], f"{rows} rows")


@pytest.mark.parametrize(
    ("dtype", "window", "heads", "kv_heads"),
    [("float32", 0, 2, 2), ("bfloat16", 23, 6, 2), ("float32", 100, 4, 2)],
)
def test_attention_has_the_same_bits_for_any_number_of_new_tokens(ran, dtype, window, heads, kv_heads):  # noqa: F811
    d, n = 200, 171  # blocks of 64 keys with vectors of 16
    q, k, v = (normal(1, h, n, d, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))

    def outcome(size: int, length: int) -> np.ndarray:
        caches = [
            Tensor.zeros(1, kv_heads, length, d, dtype=getattr(dtypes, dtype)).contiguous().realize()
            for _ in "kv"
        ]
        parts = []
        for at in range(0, n, size):
            new = [Tensor(np.ascontiguousarray(x[:, :, at : at + size])).realize() for x in (q, k, v)]
            positions = Tensor([at], dtype=dtypes.int32).realize()
            z = kernels.attention_in_cache(*new, *caches, positions, None, 0.1, window)
            parts.append(z.numpy())
        return np.concatenate(parts, 2)

    whole = outcome(n, n)
    for size, length in ((1, 190), (2, 190), (19, 500), (57, 171)):
        assert_same([outcome(size, length)], [whole], f"{size} at a time")
    assert any("attention_step" in name for name in ran)


# --- where there is no kernel for it

NO_KERNELS: dict[str, dict] = {
    "soft-capped scores": {"attention_cap": 5.0},
    "similarity general": {"similarity": "general"},
    "norms without weights": {"norm_weight": False},
}


@pytest.mark.parametrize("what", NO_KERNELS)
def test_a_model_without_such_kernels_is_named(what):
    obstacle = exact_obstacle(GPT(GPTConfig(**(SIZES | NO_KERNELS[what]))))
    assert obstacle is not None and "\n" not in obstacle


def test_the_reference_is_named(monkeypatch):
    monkeypatch.setattr(program, "_reference", lambda: True)
    assert "kernels" in str(exact_obstacle(make("gpt2")))


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "float32"), ("llama", "int8"), ("gemma3", "float32")])
def test_tokens_that_are_verified_together_have_the_bits_of_decoding(name, dtype):
    model, place = make(name, dtype), np.array([1])
    runners = [Runner(model, 3, sizes=(1,)) for _ in range(2)]
    for runner in runners:
        runner.feed(place, TEXT[None, :20])
    together = runners[0].feed(place, TEXT[None, 20:24], "every", 4)[0]
    alone = np.array([runners[1].feed(place, TEXT[None, i : i + 1])[0] for i in range(20, 24)])
    assert_same([together], [alone], "logits")
