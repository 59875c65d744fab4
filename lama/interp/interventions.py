"""Activation patching and ablation of a GPT, many runs at a time as rows of a batch."""

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
from lama.taps import Tap, replace

WatchBatches: TypeAlias = Callable[[Iterable[int], int, str], Iterable[int]]
"""A wrapper of (batches, their number, label) that may show progress."""

FLOATS = 1 << 26  # size of the largest arrays of one batch: 256 MB
RUNS = 16  # in a batch at most: enough to keep the kernels busy, few enough to show progress


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
    """The same after the corrupted prompt."""


def patch(
    model: GPT,
    clean: Sequence[int],
    corrupted: Sequence[int],
    answer: int,
    against: int,
    site: str = "resid_pre",
    watch: WatchBatches = no_progress,
) -> Patching:
    """Run the corrupted tokens with one activation at a time from the run on the clean tokens.

    There is one run for each layer and position, or for each head at all positions with the site z. Source:
    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1.

    Raises UsageError for an unknown site, and LamaError for prompts of different lengths or with the same
    logit difference, and for a model without layers.
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
    replacing = PatchedRuns(model, corrupted, {name: values})
    found = replacing.last_logits({name: masks}, watch, f"patching {site}")
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

    losses: Array
    """(N,): nats per token, over all tokens but the first; NaN for a single token."""
    logits: Array
    """(N, vocab_size): after the last token."""


def ablate(
    model: GPT,
    tokens: Sequence[int],
    removals: Sequence[Removal],
    mean: bool = False,
    watch: WatchBatches = no_progress,
) -> Ablation:
    """Run the tokens once for each removal, with its heads' outputs z and its neurons set to 0.

    With `mean` they are set to their mean over these tokens. Raises LamaError for an unknown layer, head or
    neuron, and for a model without layers.
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
        values[name] = recorded.mean(-2, keepdims=True) * mean
        n = recorded.shape[2 if name == "attn.z" else 3]
        masks[name] = np.zeros((len(removals), len(recorded), n), bool)
        for mask, members in zip(masks[name], sets, strict=True):
            for layer, i in members:
                mask[layer, i] = True
    return PatchedRuns(model, tokens, values).losses(masks, watch, "ablating")


def check_removal(model: GPT, removal: Removal) -> None:
    """Raises LamaError, listing the choices, for a layer, head or neuron that the model does not have."""
    c = model.config
    for what, members, most in (("head", removal.heads, c.n_heads), ("neuron", removal.neurons, c.d_mlp)):
        for layer, i in members:
            if not (0 <= layer < c.n_layers and 0 <= i < most):
                choices = f"{what}s 0 to {most - 1}" if most else f"no {what}s"
                there = f"layers 0 to {c.n_layers - 1} with {choices}"
                raise LamaError(
                    f"a {what} must be one of the model's; got {layer}.{i}, and there are {there}"
                )


class PatchedRuns:
    """Runs of a model on one row of tokens, captured once, with masked activations replaced."""

    def __init__(self, model: GPT, tokens: Sequence[int], values: Mapping[str, Array]):
        """`values` are the replacements (n_layers, 1, ...) by the activation's name in a block."""
        self.model, self.device = model, str(model.embed.weight.device)
        self.tokens = as_tokens(tokens).to(self.device).realize()
        check_ids(self.tokens.numpy(), model.config.vocab_size)
        self.values = {name: Tensor(value, device=self.device).realize() for name, value in values.items()}

    def last_logits(self, masks: Mapping[str, Array], watch: WatchBatches, label: str) -> Array:
        """Logits (N, vocab_size) after the last token; for `masks` see `_run`."""

        def read(x: Tensor) -> list[Tensor]:
            return [self.model.logits(x[:, -1:])[:, 0].float()]

        return self._run(masks, read, self.model.config.vocab_size, watch, label)[0]

    def losses(self, masks: Mapping[str, Array], watch: WatchBatches, label: str) -> Ablation:
        """Loss and last logits of each run; for `masks` see `_run`."""
        T = int(self.tokens.shape[1])
        # A copy: a captured step would read a slice of the tokens in place, and tinygrad's kernels need it
        # aligned.
        targets = Tensor(self.tokens[0, 1:].numpy(), device=self.device).realize() if T > 1 else None

        def read(x: Tensor) -> list[Tensor]:
            logits = self.model.logits(x).float().contiguous()
            B, last = x.shape[0], logits[:, -1]
            if targets is None:
                return [last[:, 0] * float("nan"), last]
            losses = cross_entropy(logits[:, :-1].contiguous(), targets.expand(B, T - 1).contiguous())
            return [losses.mean(-1), last]

        return Ablation(*self._run(masks, read, T * self.model.config.vocab_size, watch, label))

    def _run(
        self,
        masks: Mapping[str, Array],
        read: Callable[[Tensor], list[Tensor]],
        floats: int,
        watch: WatchBatches,
        label: str,
    ) -> list[Array]:
        """Apply `read` to the final stream of every run; `floats` is the size of a run's logits.

        Masks by the activation's name are (N, n_layers, T), for attn.z (N, n_layers, H) and for mlp.post
        (N, n_layers, d_mlp).
        """
        c, T = self.model.config, int(self.tokens.shape[1])
        n = len(next(iter(masks.values())))
        size = min(n, RUNS, max(1, FLOATS // (floats + T * (c.n_heads * T + c.d_mlp + 8 * c.d_model))))

        def step(*batch: Tensor) -> list[Tensor]:
            rows = dict(zip(masks, batch, strict=True))
            x = self.model.hidden(self.tokens.expand(size, T).contiguous(), tap=self._tap(rows))
            return [part.contiguous().realize() for part in read(x)]

        captured, inputs = CapturedStep(step), [InputBuffer(self.device) for _ in masks]
        found: list[list[Array]] = []
        for start in watch(range(0, n, size), -(-n // size), label):
            batch = [_rows(mask, start, size) for mask in masks.values()]
            parts = captured(*(give(rows) for give, rows in zip(inputs, batch, strict=True)))
            found.append([part.numpy()[: n - start] for part in parts])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _tap(self, masks: Mapping[str, Tensor]) -> Tap:
        """The tap that replaces activations where this batch's masks (B, n_layers, ...) are True."""

        def put(value: Tensor, mask: Tensor, name: str) -> Callable[[Tensor], Tensor]:
            B, n = mask.shape
            shape = {"attn.z": (B, n, 1, 1), "mlp.post": (B, 1, n)}.get(name, (B, n, 1))
            return lambda x: mask.reshape(shape).where(value.cast(x.dtype).expand(x.shape), x)

        edits = {}
        for name, values in self.values.items():
            for layer in range(self.model.config.n_layers):
                edits[f"blocks.{layer}.{name}"] = put(values[layer], masks[name][:, layer], name)
        return replace(edits)


def _rows(mask: Array, start: int, size: int) -> Array:
    """The `size` rows of a batch; past the end they are empty."""
    rows = mask[start : start + size]
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
