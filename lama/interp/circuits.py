"""A GPT's weights by head: a head's score is x W_Q W_Kᵀ yᵀ; it adds y W_V W_O to the residual stream.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from lama.attention import General, MultiHeadAttention
from lama.errors import LamaError
from lama.kernels import Quantized
from lama.layers import LayerNorm, Norm
from lama.models.adapters import refuse_adapter
from lama.models.gpt import GPT
from lama.ops import dequantize
from lama.shapes import Array


@dataclass(frozen=True)
class HeadWeights:
    """Matrices W of all heads, for x W."""

    query: Array
    """(n_layers, H, d_model, d_head), as are key and value."""
    key: Array
    value: Array
    output: Array
    """(n_layers, H, d_head, d_model)."""


def head_weights(model: GPT) -> HeadWeights:
    """The weights with the linear part of each norm folded in, without biases.

    Only a norm's division by the standard deviation is not linear: its mean and gain are folded into the
    matrices that read its output. The mean of the heads' outputs is subtracted, since LayerNorm removes it.
    Rotary positions and QK-norm are left out. A key-value head is repeated for each query head that reads it.
    Raises LamaError as `check_linear` does.
    """
    check_linear(model)
    refuse_adapter(model, "for its heads' weights")
    c = model.config
    parts = np.zeros((len(model.blocks), 4, c.n_heads, c.d_model, c.d_head), np.float32)
    for part, block in zip(parts, model.blocks, strict=True):
        part[:] = _layer_weights(block.attn, block.ln1 if block.order in ("pre", "sandwich") else None)
    q, k, v, o = parts.swapaxes(0, 1)
    return HeadWeights(q, k, v, o.swapaxes(-1, -2))


def embedding_matrix(model: GPT) -> Array:
    """W_E (vocab_size, d_model)."""
    return array(model.embed.weight)


def unembedding_matrix(model: GPT) -> Array:
    """W_U (d_model, vocab_size) with the final norm folded in. The mean of the logits is set to 0."""
    weight = array(model.embed.weight if model.unembed is None else model.unembed.weight).T
    return _read(weight - weight.mean(1, keepdims=True), model.ln_final)


def is_linear(model: GPT) -> bool:
    """Whether the heads' outputs add up in the residual stream: norm=post and residual=False prevent it."""
    return model.config.norm != "post" and model.config.residual


def check_linear(model: GPT) -> None:
    """Raise LamaError for a model that is not linear in the sense of `is_linear`."""
    if not is_linear(model):
        got = "norm=post" if model.config.norm == "post" else "residual=False"
        rule = "heads' outputs must add up in the stream, which needs norm pre or none and residual=True"
        raise LamaError(f"{rule}; got a model with {got}")


def check_layers(model: GPT) -> None:
    """Raise LamaError for a model without layers."""
    if model.config.n_layers == 0:
        raise LamaError("the model must have layers; got n_layers=0")


def check_answers(model: GPT, *answers: int | None) -> None:
    """Raise LamaError for a token that the model lacks: a tokenizer may have more tokens."""
    last = model.config.vocab_size - 1
    for answer in answers:
        if answer is not None and not 0 <= answer <= last:
            raise LamaError(f"an answer must be a token of the model, 0 to {last}; got id {answer}")


def array(weight: Tensor | Quantized) -> Array:
    """The values of a parameter in float32."""
    return (dequantize(weight) if isinstance(weight, Quantized) else weight.float()).numpy()


def _layer_weights(attn: MultiHeadAttention, norm: Norm | None) -> tuple[Array, Array, Array, Array]:
    """Query, key, value and transposed output matrices (H, d_model, d_head) of one layer."""
    weight = array(attn.qkv.weight)
    d_model, ends = weight.shape[1], np.cumsum(attn.widths)[:-1]
    parts = [part.reshape(-1, attn.d_head, d_model).swapaxes(-1, -2) for part in np.split(weight, ends)]
    q, k, v = (_read(part, norm).repeat(attn.n_heads // len(part), axis=0) for part in parts)
    if isinstance(attn.similarity, General):
        q = q @ array(attn.similarity.weight)
    out = array(attn.out.weight).reshape(d_model, attn.n_heads, attn.d_head).swapaxes(0, 1)
    return q, k, v, out - out.mean(-2, keepdims=True) if isinstance(norm, LayerNorm) else out


def _read(weight: Array, norm: Norm | None) -> Array:
    """Fold a norm into the matrix (..., d_model, n) that reads its output."""
    if norm is None:
        return weight
    if norm.weight is not None:
        weight = weight * array(norm.weight)[:, None]
    return weight - weight.mean(-2, keepdims=True) if isinstance(norm, LayerNorm) else weight
