"""The annotations are checked while the tests run, and cost nothing without jaxtyping."""

import subprocess
import sys
from pathlib import Path

import pytest
from tinygrad import Tensor, dtypes

from lama.attention import attention
from lama.embeddings import TokenEmbedding
from lama.layers import LayerNorm, initialise

jaxtyping = pytest.importorskip("jaxtyping", reason="jaxtyping is not installed: shapes are not checked")


def test_runtime_check_catches_axes_that_disagree():
    q, k = Tensor.ones(2, 5, 3), Tensor.ones(2, 7, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(q, k, k)


def test_runtime_check_catches_a_missing_axis():
    embedding = TokenEmbedding(7, 5)
    with pytest.raises(jaxtyping.TypeCheckError):
        embedding(Tensor([1, 2, 3]))


def test_runtime_check_catches_the_wrong_kind_of_number():
    embedding = TokenEmbedding(7, 5)
    with pytest.raises(jaxtyping.TypeCheckError):
        embedding(Tensor([[1.0, 2.0]]))


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.float16, dtypes.bfloat16, dtypes.float64])
def test_float_means_every_floating_dtype(dtype):
    norm = LayerNorm(5)
    initialise(norm, seed=0)
    norm(Tensor.ones(2, 5, dtype=dtype))


@pytest.mark.parametrize(
    "dtype", [dtypes.int8, dtypes.uint8, dtypes.int16, dtypes.uint16, dtypes.int32, dtypes.int64]
)
def test_int_means_every_integer_dtype(dtype):
    embedding = TokenEmbedding(7, 5)
    assert embedding(Tensor([[1, 2]], dtype=dtype)).shape == (1, 2, 5)


def test_annotations_mean_the_bare_type_without_jaxtyping():
    code = """
import sys
sys.modules["jaxtyping"] = None
from tinygrad import Tensor
from lama.shapes import Bool, Float, Int
assert Float[Tensor, "B T"] is Int[Tensor, "B"] is Bool[Tensor, "..."] is Tensor
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
