"""A model explained on its own data: the corpus, one window, attention step by step, the parameters. Strings, for any output."""

from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.data import Corpus
from lama.masks import causal_mask
from lama.models.gpt import GPT
from lama.taps import Recorder
from lama.tokenizers import Tokenizer

SHOWN = 6  # positions that a printed matrix shows


def show_tokens(tokenizer: Tokenizer, ids: Iterable[SupportsInt]) -> str:
    """Each token between bars, so that spaces and line ends can be seen: `I|n| |t|h|e`."""
    return "|".join(repr(tokenizer.decode([int(i)]))[1:-1] for i in ids)


def explain_corpus(corpus: Corpus, tokenizer: Tokenizer, train: np.ndarray, heldout: np.ndarray) -> str:
    first = train[:24]
    return (
        f"{corpus.name}: {corpus.n_characters:,} characters ({corpus.provenance}; {corpus.licence})\n"
        f"{len(train) + len(heldout):,} tokens from a vocabulary of {tokenizer.vocab_size:,}; the first {len(train):,} to learn from, "
        f"the last {len(heldout):,} to judge by\n"
        f"text    {show_tokens(tokenizer, first)}\n"
        f"tokens  {' '.join(map(str, first))}"
    )


def explain_window(tokenizer: Tokenizer, inputs: np.ndarray, targets: np.ndarray) -> str:
    """One window, inputs and targets (T,): the targets are the inputs, one step later."""
    lines = [f"a window is {len(inputs)} tokens; each position has to guess the token that follows it:"]
    for t in sorted({0, 1, 2, len(inputs) - 1} & set(range(len(inputs)))):
        seen = inputs[max(0, t - 15) : t + 1]
        dots = "..." if t > 15 else ""
        lines.append(f"  position {t:3d}  sees {dots}{show_tokens(tokenizer, seen)}   target {show_tokens(tokenizer, [targets[t]])}")
    return "\n".join(lines)


def explain_attention(model: GPT, tokenizer: Tokenizer, inputs: np.ndarray) -> str:
    """The first block's attention on one window (T,), step by step: shapes, and the first head's numbers."""
    record = Recorder("embed", "pos_embed", "blocks.0.*", "logits")
    model(Tensor(inputs.astype(np.int32).reshape(1, -1)), tap=record)
    tokens = [show_tokens(tokenizer, [i]) for i in inputs[:SHOWN]]
    n = len(tokens)
    mask = causal_mask(n, n).numpy()
    q, k = (record[f"blocks.0.attn.{name}"] for name in "qk")
    pattern = record["blocks.0.attn.pattern"].numpy()[0, 0, :n, :n]
    raw = model.blocks[0].attn.similarity(q, k).numpy()[0, 0, :n, :n]
    hidden = record.get("blocks.0.mlp.post")
    steps = (
        ("tokens", (1, len(inputs)), "the window"),
        ("embed", record["embed"].shape, "a learned vector for each token"),
        ("pos_embed", record["pos_embed"].shape, "plus one for each position"),
        ("q, k, v", record["blocks.0.attn.q"].shape, "what each position asks, offers and hands over, in every head"),
        ("scores", record["blocks.0.attn.scores"].shape, "q · k / √d_head for every pair of positions"),
        ("pattern", record["blocks.0.attn.pattern"].shape, "softmax of the scores: each row sums to 1"),
        ("z", record["blocks.0.attn.z"].shape, "the pattern's weighted mean of the values"),
        ("attn_out", record["blocks.0.attn_out"].shape, "all heads together, back in the residual stream"),
        *([] if hidden is None else [("mlp.post", hidden.shape, "the MLP's hidden layer, each position on its own")]),
        ("resid_post", record["blocks.0.resid_post"].shape, f"the stream after block 1 of {model.config.n_layers}"),
        ("logits", record["logits"].shape, "a score for each token of the vocabulary, at each position"),
    )
    lines = [f"  {name:<11}{format_shape(shape):<20}{what}" for name, shape, what in steps]
    tables = [
        ("scores of head 1, before the mask", matrix(raw, tokens)),
        ("mask: a position may look at itself and what came before (1), not ahead (.)", matrix(mask, tokens)),
        ("pattern: what is left after mask and softmax", matrix(np.where(mask, pattern, np.nan), tokens)),
    ]
    return "\n".join(lines + [f"\n  {title} (first {n} of {len(inputs)} positions)\n{table}" for title, table in tables])


def explain_parameters(model: GPT) -> str:
    """How many parameters each part has, and where they are."""
    counts: dict[str, int] = {}
    for name, parameter in get_state_dict(model).items():
        part = {"embed": "token embedding", "pos_embed": "positions", "ln_final": "final norm", "unembed": "unembedding"}
        words = name.split(".")
        key = part.get(words[0]) or {"attn": "attention", "mlp": "MLP"}.get(words[2], "norms") + f", {model.config.n_layers} blocks"
        counts[key] = counts.get(key, 0) + int(parameter.numel())
    total = sum(counts.values())
    lines = [f"  {name:<24}{count:>12,}  {count / total:6.1%}" for name, count in counts.items()]
    return "\n".join([model.describe(), *lines])


def format_shape(shape: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def matrix(values: np.ndarray, labels: list[str]) -> str:
    """A small labelled matrix; booleans as 1 and ., NaN as a dot."""

    def cell(value: np.generic) -> str:
        if values.dtype == bool:
            return "1" if value else "."
        return "." if np.isnan(float(value)) else f"{value:.2f}"

    head = " " * 6 + "".join(f"{label:>7}" for label in labels)
    return "\n".join([head] + [f"  {label:>4}" + "".join(f"{cell(v):>7}" for v in row) for label, row in zip(labels, values, strict=True)])
