"""Explain a model on its own data: the corpus, one window, attention step by step, the parameters."""

from collections.abc import Iterable
from typing import SupportsInt

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.data import Corpus
from lama.masks import causal_mask
from lama.models.gpt import GPT
from lama.models.registry import describe
from lama.ops import repeat_heads
from lama.shapes import Array
from lama.taps import Recorder
from lama.tokenizers import Tokenizer

SHOWN = 6  # positions that a printed matrix shows


def show_tokens(tokenizer: Tokenizer, ids: Iterable[SupportsInt]) -> str:
    """The tokens between bars, which show spaces and line ends: `I|n| |t|h|e`."""
    return "|".join(repr(tokenizer.decode([int(i)]))[1:-1] for i in ids)


def explain_corpus(corpus: Corpus, tokenizer: Tokenizer, train: Array, heldout: Array) -> str:
    """Describe the corpus and show its first tokens."""
    first, vocabulary = train[:24], f"a vocabulary of {tokenizer.vocab_size:,}"
    return (
        f"{corpus.name}: {corpus.n_characters:,} characters ({corpus.provenance}; {corpus.licence})\n"
        f"{len(train) + len(heldout):,} tokens from {vocabulary}: the first {len(train):,} for training, "
        f"the last {len(heldout):,} held out\n"
        f"text    {show_tokens(tokenizer, first)}\n"
        f"tokens  {' '.join(map(str, first))}"
    )


def explain_window(tokenizer: Tokenizer, inputs: Array, targets: Array) -> str:
    """Describe one window, inputs and targets (T,): the targets are the inputs one step later."""
    lines = [f"a window is {len(inputs)} tokens; each position predicts the token that follows it:"]
    for t in sorted({0, 1, 2, len(inputs) - 1} & set(range(len(inputs)))):
        seen = inputs[max(0, t - 15) : t + 1]
        dots = "..." if t > 15 else ""
        shown, target = show_tokens(tokenizer, seen), show_tokens(tokenizer, [targets[t]])
        lines.append(f"  position {t:3d}  sees {dots}{shown}   target {target}")
    return "\n".join(lines)


def explain_attention(model: GPT, tokenizer: Tokenizer, inputs: Array) -> str:
    """Show the first block's attention on one window (T,): all shapes, and the first head's numbers."""
    record = Recorder("embed", "pos_embed", "blocks.0.*", "logits")
    model(Tensor(inputs.astype(np.int32).reshape(1, -1)), tap=record)
    tokens = [show_tokens(tokenizer, [i]) for i in inputs[:SHOWN]]
    n = len(tokens)
    mask = causal_mask(n, n).numpy()
    at = {name.removeprefix("blocks.0."): value for name, value in record.items()}
    pattern = at["attn.pattern"].numpy()[0, 0, :n, :n]
    q, k = (at.get(f"attn.rot_{part}", at[f"attn.{part}"]) for part in "qk")
    raw = model.blocks[0].attn.similarity(q, repeat_heads(k, int(q.shape[1]))).numpy()[0, 0, :n, :n]
    steps = {
        "embed": "a learned vector for each token",
        "pos_embed": "plus a vector for each position",
        "attn.q": "query, key and value of each position in every head",
        "attn.scores": "q · k / √d_head for every pair of positions",
        "attn.pattern": "softmax of the scores: each row sums to 1",
        "attn.z": "the pattern's weighted mean of the values",
        "attn_out": "the sum of all heads' outputs",
        "mlp.post": "the MLP's hidden layer at each position",
        "resid_post": f"the residual stream after block 1 of {model.config.n_layers}",
        "logits": "a score for each token of the vocabulary, at each position",
    }
    lines = [f"  {'tokens':<11}{(1, len(inputs))!s:<20}the window"]
    for name, what in steps.items():
        if name in at:
            shown = "q, k, v" if name == "attn.q" else name.removeprefix("attn.")
            lines.append(f"  {shown:<11}{at[name].shape!s:<20}{what}")
    masked = np.where(mask, pattern, np.nan)
    tables = [
        ("scores of head 1, before the mask", matrix(raw, tokens)),
        ("mask: a position sees itself and earlier positions (1), not later ones (.)", matrix(mask, tokens)),
        ("pattern of head 1, after mask and softmax", matrix(masked, tokens)),
    ]
    shown = f"first {n} of {len(inputs)} positions"
    return "\n".join(lines + [f"\n  {title} ({shown})\n{table}" for title, table in tables])


def explain_parameters(model: GPT) -> str:
    """Count the parameters of each part."""
    ends = {"embed": "token embedding", "pos_embed": "positions"}
    ends |= {"ln_final": "final norm", "unembed": "unembedding"}
    parts = {"attn": "attention", "mlp": "MLP"}
    counts: dict[str, int] = {}
    for name, parameter in get_state_dict(model).items():
        words = name.split(".")
        key = ends.get(words[0]) or f"{parts.get(words[2], 'norms')}, {model.config.n_layers} blocks"
        counts[key] = counts.get(key, 0) + int(parameter.numel())
    total = sum(counts.values())
    lines = [f"  {name:<24}{count:>12,}  {count / total:6.1%}" for name, count in counts.items()]
    return "\n".join([describe(model), *lines])


def matrix(values: Array, labels: list[str]) -> str:
    """A small labelled matrix; booleans as 1 and ., NaN as a dot."""

    def cell(value: float) -> str:
        if values.dtype == bool:
            return "1" if value else "."
        return "." if np.isnan(value) else f"{value:.2f}"

    lines = [" " * 6 + "".join(f"{label:>7}" for label in labels)]
    for label, row in zip(labels, values.tolist(), strict=True):
        lines.append(f"  {label:>4}" + "".join(f"{cell(value):>7}" for value in row))
    return "\n".join(lines)
