"""What a GPT would say after each layer, and which of its parts made it say what it says."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from lama.interp.circuits import array, check_answers, check_linear
from lama.interp.record import run_with_cache
from lama.models.gpt import GPT


@dataclass(frozen=True)
class Lens:
    """The next token as it could be read from the stream, after the embedding and after each of the layers: n_layers + 1 stages."""

    answer: int
    """The token whose rank and probability these are."""
    top: np.ndarray
    """(stages, T, k): the likeliest tokens, the first the likeliest."""
    top_probability: np.ndarray
    """(stages, T, k)."""
    rank: np.ndarray
    """(stages, T): of the answer among all tokens, 1 where it is the likeliest."""
    probability: np.ndarray
    """(stages, T): of the answer."""


def logit_lens(model: GPT, tokens: Sequence[int], answer: int | None = None, k: int = 5) -> Lens:
    """Give the stream of each stage to the final norm (where there is one) and the unembedding, as if no layers followed.

    Without an answer, it is the token that the model finds likeliest after the last one. Raises LamaError for an unknown id.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    if answer is not None:
        check_answers(model, answer)
    device, k = model.embed.weight.device, min(k, model.config.vocab_size)
    logits = [model.logits(model.normalised(Tensor(x, device=device)))[0].float().numpy() for x in _streams(model, tokens)]
    answer = int(logits[-1][-1].argmax()) if answer is None else answer
    stages = []
    for at in logits:  # (T, vocab_size)
        probabilities = _softmax(at)
        top = np.argsort(-at, axis=-1, kind="stable")[:, :k]
        rank = 1 + (at > at[:, answer : answer + 1]).sum(-1)
        stages.append((top, np.take_along_axis(probabilities, top, -1), rank, probabilities[:, answer]))
    return Lens(answer, *(np.stack(part) for part in zip(*stages, strict=True)))


def _streams(model: GPT, tokens: Sequence[int]) -> list[np.ndarray]:
    """The stream (1, T, d_model) before the first layer and after each."""
    names = ("embed", "pos_embed", *(f"blocks.{i}.resid_post" for i in range(model.config.n_layers)))
    _, cache = run_with_cache(model, [tokens], *names)
    return [cache["embed"] + cache["pos_embed"], *(cache[name] for name in names[2:])]


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Attribution:
    """How much each part adds to the logit of an answer, above that of another token or above the mean of all."""

    difference: float
    """What the parts add up to, as the model has it."""
    parts: dict[str, float]
    """By the activation's name: embed, pos_embed, blocks.0.attn_out, blocks.0.mlp_out, ..., and ln_final.bias."""
    heads: np.ndarray
    """(n_layers, H): what each head has in its layer's attn_out."""
    attention_biases: np.ndarray
    """(n_layers,): the rest of it, of the bias of the output matrix."""


def attribute(model: GPT, tokens: Sequence[int], answer: int, against: int | None = None) -> Attribution:
    """Direct logit attribution after the last token: each part's share of the final stream, through the final norm, its division held
    at what it is for the whole stream, and the unembedding. Source: Elhage et al. 2021; TransformerLens, `logit_attrs`.

    Raises LamaError for a model with norm=post or without residuals, whose parts do not add up, and for ids that are no tokens.
    """
    check_linear(model)
    check_answers(model, answer, against)
    writers = ("attn_out", "mlp_out") if model.config.mlp else ("attn_out",)
    wanted = ("embed", "pos_embed", "blocks.*.attn.z", *(f"blocks.*.{name}" for name in writers))
    layers = range(model.config.n_layers)
    logits, cache = run_with_cache(model, [tokens], *(wanted if layers else wanted[:2]))
    embed, positions = (np.broadcast_to(cache[name], (*cache["embed"].shape,))[0, -1] for name in wanted[:2])
    written = {"embed": embed, "pos_embed": positions}
    for i in layers:
        written |= {f"blocks.{i}.{name}": cache[f"blocks.{i}.{name}"][0, -1] for name in writers}
    direction, bias = _read_out(model, answer, against, np.sum([part.astype(np.float64) for part in written.values()], axis=0))
    parts = {name: float(part @ direction) for name, part in written.items()} | {"ln_final.bias": bias}
    heads, biases = _heads(model, [cache[f"blocks.{i}.attn.z"][0, :, -1] for i in layers], direction)
    at = logits[0, -1].astype(np.float64)
    return Attribution(float(at[answer] - (at.mean() if against is None else at[against])), parts, heads, biases)


def _read_out(model: GPT, answer: int, against: int | None, stream: np.ndarray) -> tuple[np.ndarray, float]:
    """(direction, bias): a part of this stream (d_model,) makes a logit difference of part @ direction; the norm's bias adds its own."""
    weight = array(model.embed.weight if model.unembed is None else model.unembed.weight).astype(np.float64)  # (vocab_size, d_model)
    direction = weight[answer] - (weight.mean(0) if against is None else weight[against])
    norm = model.ln_final
    if norm is None:
        return direction, 0.0
    bias = 0.0 if norm.bias is None else float(array(norm.bias) @ direction)
    direction = direction * array(norm.weight) / np.sqrt(stream.var() + norm.epsilon)
    return direction - direction.mean(), bias  # a part's mean is taken away from it


def _heads(model: GPT, z: list[np.ndarray], direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What heads with these z (H, d_head), a layer each, add in that direction, and what the biases of the output matrices do."""
    c = model.config
    heads, biases = np.zeros((c.n_layers, c.n_heads)), np.zeros(c.n_layers)
    for i, (block, of_layer) in enumerate(zip(model.blocks, z, strict=True)):
        read = (direction @ array(block.attn.out.weight)).reshape(c.n_heads, -1)  # (H, d_head)
        heads[i] = (of_layer * read).sum(-1)
        biases[i] = 0.0 if block.attn.out.bias is None else array(block.attn.out.bias) @ direction
    return heads, biases
