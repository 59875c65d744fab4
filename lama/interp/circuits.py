"""A GPT's weights, head by head, as the matrices that attention is made of: what asks, what is looked for, what is moved.

A head scores two vectors of the stream by x W_Q W_Kᵀ yᵀ and adds y W_V W_O to the stream: those products are its QK and its OV circuit.
Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from lama.attention import General, MultiHeadAttention
from lama.errors import LamaError
from lama.kernels import Quantized
from lama.layers import LayerNorm
from lama.models.gpt import GPT


@dataclass(frozen=True)
class HeadWeights:
    """All heads of a model; rows are what a vector of the stream is multiplied with, x W."""

    query: np.ndarray
    """(n_layers, H, d_model, d_head), and so are key and value."""
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    """(n_layers, H, d_head, d_model)."""


def head_weights(model: GPT) -> HeadWeights:
    """Before each pre-norm stands a norm of which only the division by the standard deviation is not linear: its gain and the mean
    that it takes away are folded into the matrices that read from it, and the mean of what is written, which no norm lets through,
    is taken away. Biases are left out. Raises LamaError as `check_linear` does.
    """
    check_linear(model)
    parts = [_of_layer(block.attn, block.ln1 if block.norm == "pre" else None) for block in model.blocks]
    d_model, n_heads = model.config.d_model, model.config.n_heads
    none = np.zeros((4, 0, n_heads, d_model, d_model // n_heads), np.float32)  # of a model without layers
    q, k, v, o = np.stack([np.stack(part) for part in parts], 1) if parts else none
    return HeadWeights(q, k, v, o.swapaxes(-1, -2))


def embedding(model: GPT) -> np.ndarray:
    """W_E (vocab_size, d_model)."""
    return array(model.embed.weight)


def unembedding(model: GPT) -> np.ndarray:
    """W_U (d_model, vocab_size) with the final norm folded in as `head_weights` does; centred, since a number that is added to all
    logits says nothing."""
    weight = array(model.embed.weight if model.unembed is None else model.unembed.weight).T
    return _read(weight - weight.mean(1, keepdims=True), model.ln_final)


def check_linear(model: GPT) -> None:
    """Refuse a model in whose stream the heads' outputs do not add up. Raises LamaError."""
    if model.config.norm == "post" or not model.config.residual:
        got = "norm=post" if model.config.norm == "post" else "residual=False"
        raise LamaError(f"what heads write must add up in the stream, as with norm pre or none and residual=True; got a model with {got}")


def check_layers(model: GPT) -> None:
    """Raises LamaError for a model without layers: it has neither heads nor neurons."""
    if model.config.n_layers == 0:
        raise LamaError("the model must have layers; got n_layers=0")


def check_answers(model: GPT, *answers: int | None) -> None:
    """Raises LamaError for an answer that the model has no row for; a tokenizer may be larger than its model."""
    for answer in answers:
        if answer is not None and not 0 <= answer < model.config.vocab_size:
            raise LamaError(f"an answer must be a token of the model, 0 to {model.config.vocab_size - 1}; got id {answer}")


def array(weight: Tensor | Quantized) -> np.ndarray:
    """A parameter's numbers, in float32."""
    return weight.float().numpy()


def _of_layer(attn: MultiHeadAttention, norm: LayerNorm | None) -> tuple[np.ndarray, ...]:
    """Query, key, value and output (d_model, d_head) of each head; the output's is transposed."""
    d_model = attn.n_heads * attn.d_head
    qkv = array(attn.qkv.weight).reshape(3, attn.n_heads, attn.d_head, d_model).swapaxes(-1, -2)  # (3, H, d_model, d_head)
    q, k, v = _read(qkv, norm)
    if isinstance(attn.similarity, General):
        q = q @ array(attn.similarity.weight)
    out = array(attn.out.weight).reshape(d_model, attn.n_heads, attn.d_head).swapaxes(0, 1)  # (H, d_model, d_head)
    return q, k, v, out if norm is None else out - out.mean(-2, keepdims=True)


def _read(weight: np.ndarray, norm: LayerNorm | None) -> np.ndarray:
    """A matrix (..., d_model, n) that reads what `norm` gives, as one that reads what `norm` gets."""
    if norm is None:
        return weight
    weight = weight * array(norm.weight)[:, None]
    return weight - weight.mean(-2, keepdims=True)
