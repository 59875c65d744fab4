"""C kernels where tinygrad's own schedule is slow: each returns the result of its twin in `ops`, or None."""

from lama.kernels.attention import attention, attention_in_cache
from lama.kernels.cross_entropy import cross_entropy
from lama.kernels.dropout import dropout
from lama.kernels.elementwise import add, gelu, softmax
from lama.kernels.embedding import embedding, fusible_rows
from lama.kernels.gated import gated
from lama.kernels.integers import round_activations
from lama.kernels.layernorm import layernorm, rmsnorm
from lama.kernels.matmul import matmul, matmul_precision
from lama.kernels.optimizer import adamw, muon_directions, muon_step, square_parts
from lama.kernels.quantized import Quantized, dequantize, quantize
from lama.kernels.rope import rotate

__all__ = [
    "Quantized",
    "adamw",
    "add",
    "attention",
    "attention_in_cache",
    "cross_entropy",
    "dequantize",
    "dropout",
    "embedding",
    "fusible_rows",
    "gated",
    "gelu",
    "layernorm",
    "matmul",
    "matmul_precision",
    "muon_directions",
    "muon_step",
    "quantize",
    "rmsnorm",
    "rotate",
    "round_activations",
    "softmax",
    "square_parts",
]
