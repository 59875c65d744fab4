"""Logit lens and direct logit attribution: predictions after each layer, and what each part adds to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from lama.blocks import Block
from lama.interp.circuits import array, check_answers, check_linear
from lama.interp.record import run_with_cache
from lama.kernels import Quantized
from lama.layers import LayerNorm, Norm
from lama.models.adapters import refuse_adapter
from lama.models.gpt import GPT
from lama.ops import round_activations
from lama.shapes import Array


@dataclass(frozen=True)
class Lens:
    """Predictions of the next token after the embedding and after each layer: n_layers + 1 stages."""

    answer: int
    """The token of rank and probability."""
    top: Array
    """(stages, T, k): the likeliest tokens in order."""
    top_probability: Array
    """(stages, T, k)."""
    rank: Array
    """(stages, T): rank of the answer; 1 is the likeliest token."""
    probability: Array
    """(stages, T)."""


def logit_lens(model: GPT, tokens: Sequence[int], answer: int | None = None, k: int = 5) -> Lens:
    """Apply the final norm (if any) and the unembedding to the residual stream at each stage.

    The default answer is the likeliest next token. Raises LamaError for an unknown id. Source: nostalgebraist
    2020, "interpreting GPT: the logit lens".
    """
    check_answers(model, answer)
    names = ("embed", "pos_embed", *(f"blocks.{i}.resid_post" for i in range(model.config.n_layers)))
    _, cache = run_with_cache(model, [tokens], *names)
    streams = [cache["embed"] + cache["pos_embed"], *(cache[name] for name in names[2:])]  # (1, T, d_model)
    logits = []
    for stream in streams:
        x = Tensor(stream, device=model.embed.weight.device)
        logits.append(model.logits(model.normalised(x))[0].float().numpy())
    answer = int(logits[-1][-1].argmax()) if answer is None else answer
    stages = []
    for at in logits:  # (T, vocab_size)
        probabilities = np.exp(at - at.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        top = np.argsort(-at, axis=-1, kind="stable")[:, :k]
        rank = 1 + (at > at[:, answer : answer + 1]).sum(-1)
        stages.append((top, np.take_along_axis(probabilities, top, -1), rank, probabilities[:, answer]))
    return Lens(answer, *(np.stack(part) for part in zip(*stages, strict=True)))


@dataclass(frozen=True)
class Attribution:
    """Contributions of all parts to an answer's logit, above another token's or above the mean of all."""

    difference: float
    """The difference in the model's logits, before a soft cap: the sum of the parts."""
    parts: dict[str, float]
    """Contributions by name: embed, pos_embed, blocks.0.attn_out, blocks.0.mlp_out, ..., ln_final.bias.

    `rounding` is the effect of rounded activations before a quantised unembedding.
    """
    heads: Array
    """(n_layers, H): what each head adds of its layer's attn_out; the output's bias adds the rest."""


def attribute(model: GPT, tokens: Sequence[int], answer: int, against: int | None = None) -> Attribution:
    """Direct logit attribution after the last token.

    Each part of the final stream passes through the final norm, which divides by the standard deviation of
    the whole stream, and the unembedding. Source: Elhage et al. 2021; TransformerLens, `logit_attrs`. Raises
    LamaError as `check_linear` and `check_answers` do.
    """
    check_linear(model)
    check_answers(model, answer, against)
    refuse_adapter(model, "for an attribution")
    writers = ("attn_out", "mlp_out") if model.config.mlp else ("attn_out",)
    wanted = ("embed", "pos_embed", "blocks.*.attn.z", *(f"blocks.*.{name}" for name in writers))
    layers = range(model.config.n_layers)
    logits, cache = run_with_cache(model, [tokens], *(wanted if layers else wanted[:2]))
    positions = np.broadcast_to(cache["pos_embed"], cache["embed"].shape)
    written = {"embed": cache["embed"][0, -1], "pos_embed": positions[0, -1]}
    for i in layers:
        written |= {f"blocks.{i}.{name}": cache[f"blocks.{i}.{name}"][0, -1] for name in writers}
    stream = np.sum([part.astype(np.float64) for part in written.values()], axis=0)
    direction, bias, rounding = _read_out(model, answer, against, stream)
    parts = {name: float(part @ direction) for name, part in written.items()} | {"ln_final.bias": bias}
    if rounding is not None:
        parts["rounding"] = rounding
    heads = np.zeros((len(layers), model.config.n_heads))
    for i in layers:
        z, attn = cache[f"blocks.{i}.attn.z"][0, :, -1], model.blocks[i].attn  # z (H, d_head)
        multiplied = _as_multiplied(z.reshape(-1), attn.out.weight)
        through = _through_output_norm(model.blocks[i], direction, multiplied)
        heads[i] = (multiplied * (through @ array(attn.out.weight))).reshape(z.shape).sum(-1)
    at = _uncapped(logits[0, -1].astype(np.float64), model.config.logit_cap)
    other = at.mean() if against is None else at[against]
    return Attribution(float(at[answer] - other), parts, heads)


def _read_out(
    model: GPT, answer: int, against: int | None, stream: Array
) -> tuple[Array, float, float | None]:
    """(direction, bias, rounding): a part (d_model,) of the stream adds part @ direction to the logit."""
    parameter = model.embed.weight if model.unembed is None else model.unembed.weight
    weight = array(parameter).astype(np.float64)  # (vocab_size, d_model)
    direction = weight[answer] - (weight.mean(0) if against is None else weight[against])
    read, bias, through = stream, 0.0, direction
    if model.ln_final is not None:
        read, shift, through = _through_norm(model.ln_final, stream, direction)
        bias = float(shift @ direction)
    if model.unembed is not None and model.unembed.bias is not None:
        biases = array(model.unembed.bias).astype(np.float64)
        bias += float(biases[answer] - (biases.mean() if against is None else biases[against]))
    rounding = float((_as_multiplied(read, parameter) - read) @ direction)
    return through, bias, rounding if isinstance(parameter, Quantized) and parameter.rounds else None


def _through_norm(norm: Norm, stream: Array, direction: Array) -> tuple[Array, Array, Array]:
    """The normalised stream, the norm's bias, and the direction for parts of the stream before the norm."""
    ones = np.ones(len(stream))
    centred = isinstance(norm, LayerNorm)
    spread = stream.var() if centred else (stream * stream).mean()
    gain = (ones if norm.weight is None else array(norm.weight)) / np.sqrt(spread + norm.epsilon)
    shift = array(norm.bias) if isinstance(norm, LayerNorm) and norm.bias is not None else 0 * ones
    through = direction * gain
    if centred:  # the norm subtracts a part's mean
        return (stream - stream.mean()) * gain + shift, shift, through - through.mean()
    return stream * gain + shift, shift, through


def _through_output_norm(block: Block, direction: Array, z: Array) -> Array:
    """The direction for attention's output z, before the norm that some blocks apply to it."""
    norm = {"output": block.ln1, "sandwich": block.ln1_post}.get(block.order)
    if norm is None:
        return direction
    out = z.astype(np.float64) @ array(block.attn.out.weight).astype(np.float64).T
    if block.attn.out.bias is not None:
        out = out + array(block.attn.out.bias)
    return _through_norm(norm, out, direction)[2]


def _uncapped(logits: Array, cap: float) -> Array:
    """The logits before the soft cap, which is not linear."""
    return cap * np.arctanh(logits / cap) if cap else logits


def _as_multiplied(x: Array, weight: Tensor | Quantized) -> Array:
    """x (d,) as it enters a product with this weight: a quantised weight may round its input."""
    rounds = isinstance(weight, Quantized) and weight.rounds
    return round_activations(Tensor(x.astype(np.float32))).numpy() if rounds else x
