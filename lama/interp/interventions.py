"""Runs of a GPT in which something is removed, or taken from a run on other tokens: many such runs at a time, as rows of a batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.embeddings import check_ids
from lama.errors import LamaError, UsageError
from lama.interp.circuits import check_answers, check_layers
from lama.interp.record import as_tokens, run_with_cache
from lama.jit import Input, capture_at_once
from lama.kernels import cross_entropy
from lama.models.gpt import GPT
from lama.taps import Tap, replace

Watch = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Is handed what is iterated over, its length and its name, and may show how far it is."""

SITES = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "z": "attn.z",
}
"""What can be patched, and its name in a block: the stream before the block, between attention and MLP, and after it, what either adds,
and what each head hands on."""

FLOATS = 1 << 26  # that the largest arrays of one batch may take together: 256 MB
RUNS = 16  # of a batch at most: enough to keep the kernels busy, few enough to see how far it is


def unwatched(steps: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return steps


@dataclass(frozen=True)
class Patching:
    """Result of activation patching."""

    site: str
    effect: np.ndarray
    """(n_layers, T), of the site z (n_layers, H): the logit difference, 0 as in the corrupted run, 1 as in the clean one."""
    clean: float
    """Logit of the answer − logit of the other token, after the last token of the clean prompt."""
    corrupted: float
    """The same after the corrupted prompt."""


def patch(
    model: GPT, clean: Sequence[int], corrupted: Sequence[int], answer: int, against: int, site: str = "resid_pre", watch: Watch = unwatched
) -> Patching:
    """Run the corrupted tokens once for each layer and position, the activation there taken from the run on the clean ones; with the site
    z, once for each head, at all positions. Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1.

    Raises UsageError for an unknown site, and LamaError for prompts of different lengths, or with the same logit difference, and for a
    model without layers.
    """
    if site not in SITES:
        raise UsageError(f"site must be one of {', '.join(SITES)}; got {site!r}")
    if len(clean) != len(corrupted):
        raise LamaError(f"the two prompts must have equally many tokens; got {len(clean)} in the clean one, {len(corrupted)} in the other")
    check_layers(model)
    check_answers(model, answer, against)
    if site == "mlp_out" and not model.config.mlp:
        raise LamaError("site mlp_out requires a model with MLPs; got mlp=False")
    logits, cache = run_with_cache(model, [clean], f"blocks.*.{SITES[site]}")
    values = cache.layers(SITES[site])  # (n_layers, 1, T, d_model) or (n_layers, 1, H, T, d_head)
    n_layers, n = len(values), values.shape[2]  # T, or H
    masks = np.eye(n_layers * n, dtype=bool).reshape(-1, n_layers, n)
    masks = np.concatenate([np.zeros_like(masks[:1]), masks])  # the first run is the corrupted one
    found = Replacing(model, corrupted, {SITES[site]: values}).last_logits({SITES[site]: masks}, watch, f"patching {site}")
    differences = found[:, answer] - found[:, against]
    base, best = differences[0], logits[0, -1, answer] - logits[0, -1, against]
    if abs(best - base) < 1e-4:
        raise LamaError(f"the prompts must differ in the logits of the two answers; got a difference of {best:.4f} and of {base:.4f}")
    effect = ((differences[1:] - base) / (best - base)).reshape(n_layers, n)
    return Patching(site, effect, float(best), float(base))


@dataclass(frozen=True)
class Removal:
    """Heads (layer, head) and neurons (layer, neuron) that are removed together."""

    heads: tuple[tuple[int, int], ...] = ()
    neurons: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        heads, neurons = [f"head {i}.{j}" for i, j in self.heads], [f"neuron {i}.{j}" for i, j in self.neurons]
        return " + ".join(heads + neurons) or "nothing"


@dataclass(frozen=True)
class Ablation:
    """What the model says without some of its parts, each array with a row for each removal."""

    losses: np.ndarray
    """(N,): nats per token, over all tokens but the first; NaN where there is only one."""
    logits: np.ndarray
    """(N, vocab_size): after the last token."""


def ablate(model: GPT, tokens: Sequence[int], removals: Sequence[Removal], mean: bool = False, watch: Watch = unwatched) -> Ablation:
    """Run the tokens once for each removal: with what its heads hand on (z), and its neurons' activations, set to 0, or with `mean` to
    their mean over these tokens. Raises LamaError for a layer, head or neuron that is not there, and for a model without layers.
    """
    check_layers(model)
    for removal in removals:
        check_there(model, removal)
    names = {"attn.z": [removal.heads for removal in removals], "mlp.post": [removal.neurons for removal in removals]}
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
    return Replacing(model, tokens, values).losses(masks, watch, "ablating")


def check_there(model: GPT, removal: Removal) -> None:
    """Raises LamaError for a layer, head or neuron that the model does not have, and says which there are."""
    c = model.config
    for what, members, most in (("head", removal.heads, c.n_heads), ("neuron", removal.neurons, c.d_mlp)):
        for layer, i in members:
            if not (0 <= layer < c.n_layers and 0 <= i < most):
                there = f"layers 0 to {c.n_layers - 1} with {f'{what}s 0 to {most - 1}' if most else f'no {what}s'}"
                raise LamaError(f"a {what} must be one of the model's; got {layer}.{i}, and there are {there}")


class Replacing:
    """A model on one row of tokens, captured once, with activations of all layers replaced where masks say so."""

    def __init__(self, model: GPT, tokens: Sequence[int], values: Mapping[str, np.ndarray]):
        """`values` by the activation's name in a block, each (n_layers, 1, ...): what comes in its place."""
        self.model, self.device = model, str(model.embed.weight.device)
        self.tokens = as_tokens(tokens).to(self.device).realize()
        check_ids(self.tokens.numpy(), model.config.vocab_size)
        self.values = {name: Tensor(value, device=self.device).realize() for name, value in values.items()}

    def last_logits(self, masks: Mapping[str, np.ndarray], watch: Watch, label: str) -> np.ndarray:
        """(N, vocab_size) after the last token; masks as `_run` has them."""
        (logits,) = self._run(masks, lambda x: [self.model.logits(x[:, -1:])[:, 0].float()], self.model.config.vocab_size, watch, label)
        return logits

    def losses(self, masks: Mapping[str, np.ndarray], watch: Watch, label: str) -> Ablation:
        """The loss of each run and its logits after the last token."""
        T = int(self.tokens.shape[1])
        # Their own tensor: in a captured step, a part of the tokens would be read in place, where tinygrad's kernels need it aligned.
        targets = Tensor(self.tokens[0, 1:].numpy(), device=self.device).realize() if T > 1 else None

        def read(x: Tensor) -> list[Tensor]:
            logits = self.model.logits(x).float().contiguous()
            B, last = x.shape[0], logits[:, -1]
            if targets is None:
                return [last[:, 0] * float("nan"), last]
            return [cross_entropy(logits[:, :-1].contiguous(), targets.expand(B, T - 1).contiguous()).mean(-1), last]

        return Ablation(*self._run(masks, read, T * self.model.config.vocab_size, watch, label))

    def _run(
        self, masks: Mapping[str, np.ndarray], read: Callable[[Tensor], list[Tensor]], floats: int, watch: Watch, label: str
    ) -> list[np.ndarray]:
        """`read` of the final stream of every run. Masks, by the activation's name, are (N, n_layers, T), of attn.z (N, n_layers, H)
        and of mlp.post (N, n_layers, d_mlp); `floats` are what a run's logits take."""
        c, T = self.model.config, int(self.tokens.shape[1])
        n = len(next(iter(masks.values())))
        size = min(n, RUNS, max(1, FLOATS // (floats + T * (c.n_heads * T + c.d_mlp + 8 * c.d_model))))

        def step(*batch: Tensor) -> list[Tensor]:
            rows = dict(zip(masks, batch, strict=True))
            x = self.model.hidden(self.tokens.expand(size, T).contiguous(), tap=self._tap(rows))
            return [part.contiguous().realize() for part in read(x)]

        captured, inputs = capture_at_once(step), [Input(self.device) for _ in masks]
        found: list[list[np.ndarray]] = []
        for start in watch(range(0, n, size), -(-n // size), label):
            batch = [_rows(mask, start, size) for mask in masks.values()]
            parts = captured(*(give(rows) for give, rows in zip(inputs, batch, strict=True)))
            found.append([part.numpy()[: n - start] for part in parts])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _tap(self, masks: Mapping[str, Tensor]) -> Tap:
        """Puts the values where the masks (B, n_layers, ...) of this batch are."""

        def put(value: Tensor, mask: Tensor, name: str) -> Callable[[Tensor], Tensor]:
            B, n = mask.shape
            shape = {"attn.z": (B, n, 1, 1), "mlp.post": (B, 1, n)}.get(name, (B, n, 1))
            return lambda x: mask.reshape(shape).where(value.cast(x.dtype).expand(x.shape), x)

        return replace(
            {
                f"blocks.{layer}.{name}": put(self.values[name][layer], masks[name][:, layer], name)
                for name in self.values
                for layer in range(self.model.config.n_layers)
            }
        )


def _rows(mask: np.ndarray, start: int, size: int) -> np.ndarray:
    """Rows of a batch, always `size` of them: the last ones may be empty."""
    rows = mask[start : start + size]
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
