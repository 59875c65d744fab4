"""Fast paths for devices where tinygrad's own schedule is slow. Each does what its plain tinygrad twin does."""

from lama.kernels.attention import attends, attends_in, attention, attention_in_cache
from lama.kernels.cross_entropy import cross_entropy
from lama.kernels.dropout import dropout
from lama.kernels.elementwise import add, gelu, softmax
from lama.kernels.embedding import embedding
from lama.kernels.fusion import apart
from lama.kernels.layernorm import layernorm
from lama.kernels.matmul import matmul, products_in
from lama.kernels.memory import host_numbers, stored_zeros, use_large_pages
from lama.kernels.optimizer import adamw, sum_of_squares
from lama.kernels.quantized import Quantized, quantize
from lama.kernels.views import stored

__all__ = [
    "Quantized",
    "adamw",
    "add",
    "apart",
    "attends",
    "attends_in",
    "attention",
    "attention_in_cache",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "host_numbers",
    "layernorm",
    "matmul",
    "products_in",
    "quantize",
    "softmax",
    "stored",
    "stored_zeros",
    "sum_of_squares",
    "use_large_pages",
]
