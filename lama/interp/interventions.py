"""Activation patching and ablation of a GPT. The runs are rows of a batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from tinygrad import Tensor

from lama.embeddings import check_ids
from lama.errors import LamaError, UsageError
from lama.interp import SITES
from lama.interp.circuits import check_answers, check_layers
from lama.interp.record import as_tokens, run_with_cache
from lama.models.gpt import GPT
from lama.ops import cross_entropy
from lama.runtime.capture import CapturedStep, InputBuffer
from lama.shapes import Array
from lama.taps import replace

WatchBatches: TypeAlias = Callable[[Iterable[int], int, str], Iterable[int]]
"""A wrapper of (batches, their number, label) that may show progress."""

FLOATS = 1 << 26  # size of the largest arrays of one batch: 256 MB
RUNS = 16  # in a batch at most: enough for the kernels, few enough to show progress


def no_progress(batches: Iterable[int], total: int, label: str) -> Iterable[int]:
    """The default WatchBatches."""
    return batches


@dataclass(frozen=True)
class Patching:
    """Result of activation patching."""

    site: str
    effect: Array
    """(n_layers, T), or (n_layers, H) for z: 0 is the corrupted run's logit difference, 1 the clean run's."""
    clean: float
    """Logit of the answer − logit of the other token, after the clean prompt."""
    corrupted: float


def patch(
    model: GPT,
    clean: Sequence[int],
    corrupted: Sequence[int],
    answer: int,
    against: int,
    site: str = "resid_pre",
    watch: WatchBatches = no_progress,
) -> Patching:
    """Run the corrupted tokens, each time with one activation replaced by that of the clean tokens.

    There is one run for each layer and position; with the site z, for each head at all positions. Source:
    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1. Raises UsageError for
    an unknown site, LamaError for prompts of different lengths or with the same logit difference, and for a
    model without layers.
    """
    if site not in SITES:
        raise UsageError(f"site must be one of {', '.join(SITES)}; got {site!r}")
    if len(clean) != len(corrupted):
        got = f"{len(clean)} in the clean one, {len(corrupted)} in the other"
        raise LamaError(f"the two prompts must have equally many tokens; got {got}")
    check_layers(model)
    check_answers(model, answer, against)
    if site == "mlp_out" and not model.config.mlp:
        raise LamaError("site mlp_out requires a model with MLPs; got mlp=False")
    name = SITES[site]
    logits, cache = run_with_cache(model, [clean], f"blocks.*.{name}")
    values = cache.layers(name)  # (n_layers, 1, T, d_model) or (n_layers, 1, H, T, d_head)
    n_layers, n = len(values), values.shape[2]  # T, or H
    masks = np.eye(n_layers * n, dtype=bool).reshape(-1, n_layers, n)
    masks = np.concatenate([np.zeros_like(masks[:1]), masks])  # the first run is the corrupted one

    def read(x: Tensor) -> list[Tensor]:
        return [model.logits(x[:, -1:])[:, 0].float()]

    at, size, label = {name: masks}, model.config.vocab_size, f"patching {site}"
    (found,) = patched_runs(model, corrupted, {name: values}, at, read, size, watch, label)
    differences = found[:, answer] - found[:, against]
    base, best = differences[0], logits[0, -1, answer] - logits[0, -1, against]
    if abs(best - base) < 1e-4:
        got = f"a difference of {best:.4f} and of {base:.4f}"
        raise LamaError(f"the prompts must differ in the logits of the two answers; got {got}")
    effect = ((differences[1:] - base) / (best - base)).reshape(n_layers, n)
    return Patching(site, effect, float(best), float(base))


@dataclass(frozen=True)
class Removal:
    """Heads (layer, head) and neurons (layer, neuron) to remove in one run."""

    heads: tuple[tuple[int, int], ...] = ()
    neurons: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        heads = [f"head {i}.{j}" for i, j in self.heads]
        neurons = [f"neuron {i}.{j}" for i, j in self.neurons]
        return " + ".join(heads + neurons) or "nothing"


@dataclass(frozen=True)
class Ablation:
    """Results of ablation, a row for each removal."""

    token_losses: Array
    """(N, T − 1): nats, for each token but the first; (N, 1) of NaN for a single token."""
    logits: Array
    """(N, vocab_size): after the last token."""

    @property
    def losses(self) -> Array:
        """(N,): nats per token, over all tokens but the first; NaN for a single token."""
        return np.asarray(self.token_losses.mean(-1))


def ablate(
    model: GPT,
    tokens: Sequence[int],
    removals: Sequence[Removal],
    mean: bool = False,
    watch: WatchBatches = no_progress,
) -> Ablation:
    """Run the tokens once for each removal, with its heads' outputs z and its neurons set to 0.

    With `mean` they are set to their mean over the tokens. Raises LamaError as `check_removal` does, and for
    a model without layers.
    """
    check_layers(model)
    for removal in removals:
        check_removal(model, removal)
    names = {
        "attn.z": [removal.heads for removal in removals],
        "mlp.post": [removal.neurons for removal in removals],
    }
    used = {name: sets for name, sets in names.items() if any(sets)} or names
    _, cache = run_with_cache(model, [tokens], *(f"blocks.*.{name}" for name in used))
    values, masks = {}, {}
    for name, sets in used.items():
        recorded = cache.layers(name)  # (n_layers, 1, H, T, d_head) or (n_layers, 1, T, d_mlp)
        values[name] = recorded.mean(-2, keepdims=True) if mean else np.zeros_like(recorded[..., :1, :])
        n = recorded.shape[2 if name == "attn.z" else 3]
        masks[name] = np.zeros((len(removals), len(recorded), n), bool)
        for mask, members in zip(masks[name], sets, strict=True):
            for layer, i in members:
                mask[layer, i] = True
    T, device = len(tokens), model.embed.weight.device
    targets = Tensor(np.array(tokens[1:], np.int32), device=device).realize() if T > 1 else None

    def read(x: Tensor) -> list[Tensor]:
        logits = model.logits(x).float().contiguous()
        B, last = x.shape[0], logits[:, -1]
        if targets is None:
            return [last[:, :1] * float("nan"), last]
        return [cross_entropy(logits[:, :-1].contiguous(), targets.expand(B, T - 1).contiguous()), last]

    size = T * model.config.vocab_size
    return Ablation(*patched_runs(model, tokens, values, masks, read, size, watch, "ablating"))


def check_removal(model: GPT, removal: Removal) -> None:
    """Raise LamaError, listing the choices, for an unknown layer, head or neuron."""
    c = model.config
    for what, members, most in (("head", removal.heads, c.n_heads), ("neuron", removal.neurons, c.d_mlp)):
        for layer, i in members:
            if not (0 <= layer < c.n_layers and 0 <= i < most):
                choices = f"{what}s 0 to {most - 1}" if most else f"no {what}s"
                got = f"{layer}.{i}, and there are layers 0 to {c.n_layers - 1} with {choices}"
                raise LamaError(f"a {what} must be one of the model's; got {got}")


def random_heads(
    heads: Sequence[tuple[int, int]], n_heads: int, draws: int, seed: int = 0
) -> list[tuple[tuple[int, int], ...]]:
    """Random heads (layer, head), `draws` times: in each layer as many as in `heads`, and none of these.

    Raises LamaError for a layer with too few others of its `n_heads`.
    """
    rng, groups = np.random.default_rng(seed), []
    for layer in sorted({layer for layer, _ in heads}):
        taken = sorted({head for i, head in heads if i == layer})
        others = np.setdiff1d(np.arange(n_heads), taken)
        if len(others) < len(taken):
            rule = "each layer must have as many other heads as are removed from it"
            raise LamaError(f"{rule}; got {len(taken)} of layer {layer}'s {n_heads} heads")
        groups.append((layer, others, len(taken)))
    drawn = [[(i, rng.choice(others, n, replace=False)) for i, others, n in groups] for _ in range(draws)]
    return [tuple((i, int(head)) for i, members in draw for head in members) for draw in drawn]


def patched_runs(
    model: GPT,
    tokens: Sequence[int],
    values: Mapping[str, Array],
    masks: Mapping[str, Array],
    read: Callable[[Tensor], list[Tensor]],
    floats: int,
    watch: WatchBatches,
    label: str,
) -> list[Array]:
    """Run the tokens once for each row of the masks, with activations replaced; `read` the final stream.

    `values` and `masks` have an item for each activation's name in a block. Values are the replacements
    (n_layers, 1, ...). Masks choose positions (N, n_layers, T); heads (N, n_layers, H) of attn.z; neurons
    (N, n_layers, d_mlp) of mlp.post. `floats` is the size of one run's logits.
    """
    c, T, device = model.config, len(tokens), str(model.embed.weight.device)
    row = as_tokens(tokens).to(device).realize()
    check_ids(row.numpy(), c.vocab_size)
    replacements = {name: Tensor(value, device=device).realize() for name, value in values.items()}
    n = len(next(iter(masks.values())))
    size = min(n, RUNS, max(1, FLOATS // (floats + T * (c.n_heads * T + c.d_mlp + 8 * c.d_model))))

    def put(value: Tensor, mask: Tensor, name: str) -> Callable[[Tensor], Tensor]:
        """Replace an activation where the batch's mask (B, ...) is True."""
        shape = {"attn.z": (size, -1, 1, 1), "mlp.post": (size, 1, -1)}.get(name, (size, -1, 1))
        return lambda x: mask.reshape(shape).where(value.cast(x.dtype).expand(x.shape), x)

    def step(*batch: Tensor) -> list[Tensor]:
        edits = {}
        for name, mask in zip(masks, batch, strict=True):
            for layer in range(c.n_layers):
                edits[f"blocks.{layer}.{name}"] = put(replacements[name][layer], mask[:, layer], name)
        x = model.hidden(row.expand(size, T).contiguous(), tap=replace(edits))
        return [part.contiguous().realize() for part in read(x)]

    captured, inputs = CapturedStep(step), [InputBuffer(device) for _ in masks]
    # The last batch is completed by runs that replace nothing.
    filled = [np.concatenate([mask, np.zeros_like(mask[: -n % size])]) for mask in masks.values()]
    found: list[list[Array]] = []
    for start in watch(range(0, n, size), -(-n // size), label):
        batch = (give(mask[start : start + size]) for give, mask in zip(inputs, filled, strict=True))
        found.append([part.numpy() for part in captured(*batch)])
    return [np.concatenate(parts)[:n] for parts in zip(*found, strict=True)]
