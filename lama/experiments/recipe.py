"""Compare the choices of the modern presets, each replaced alone, at a fixed number of steps."""

from dataclasses import dataclass

import numpy as np

from lama.data import evaluation_windows
from lama.experiments.report import Options, Report, Table
from lama.experiments.text import EVALUATED, TextFit, data, loss_panel
from lama.models.registry import n_parameters
from lama.training.loop import Trainer, language_model_batches
from lama.training.loss import Evaluator
from lama.training.prepare import model_config, new_model
from lama.training.settings import read_settings, run_config
from lama.training.settings.base import Settings

PRESET, BEFORE, STEPS, SEEDS = "modern-char-cpu", "shakespeare-char-cpu", 180, 2
RECIPE, ADAMW = "the recipe", "AdamW at its best rate of three"
ONE_RATE = {"matrix_learning_rate": 0.0, "embedding_learning_rate": 0.0}
CHANGES: dict[str, tuple[Settings, ...]] = {
    RECIPE: ({},),
    ADAMW: tuple({"optimizer": "adamw", **ONE_RATE, "learning_rate": r} for r in (1.5e-3, 3e-3, 6e-3)),
    "embeddings at the rate of vectors": ({"embedding_learning_rate": 0.0},),
    "momentum 0.95": ({"momentum": 0.95},),
    "weight decay 0.1": ({"weight_decay": 0.1},),
    "a cosine instead of wsd": ({"schedule": "cosine"},),
    "GPT-2's initial weights": ({"initial_weights": "gpt2"},),
    "one matrix for tokens and logits": ({"tied": True},),
    "learned positions": ({"positions": "learned"},),
    "θ = 10,000": ({"rope_theta": 10_000.0},),
    "LayerNorm": ({"norm_kind": "layer"},),
    "no QK-norm": ({"qk_norm": "none"},),
    "QK-norm after the rotation": ({"qk_norm": "head_after"},),
    "GELU without a gate": ({"gated": False, "activation": "gelu_new", "d_mlp": 512},),
    "relu² without a gate": ({"gated": False, "activation": "relu2", "d_mlp": 512},),
    "float32": ({"precision": "float32"},),
}
"""The changes to the preset by name; where there are several, the best one counts."""


@dataclass(frozen=True)
class Trial:
    """Trainings with several seeds."""

    parameters: int
    losses: list[list[float]]
    """Training losses by seed and step."""
    heldout: list[float]
    """Held-out losses by seed."""

    @property
    def mean(self) -> float:
        """The mean held-out loss."""
        return float(np.mean(self.heldout))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return float(np.std(self.heldout, ddof=1) / len(self.heldout) ** 0.5)


def trial(options: Options, name: str, settings: Settings) -> Trial:
    """Train a model with these settings, once for each seed."""
    train, held_out, vocab_size = data()
    steps = options.steps or STEPS
    losses, heldout, size = [], [], 0
    for seed in range(options.seed, options.seed + SEEDS):
        own = {"steps": steps, "seed": seed, "warmup": min(steps // 10, 10)}
        config = run_config({**settings, **own})
        model = new_model(config, model_config(config, vocab_size))
        trainer = Trainer(model, language_model_batches(train, config, config.context_length), config)
        watched = options.watch(trainer, steps, f"{name}, seed {seed}")
        losses.append([step.loss for step in watched])
        heldout.append(Evaluator(model, evaluation_windows(held_out, config.context_length, EVALUATED), 64)())
        size = n_parameters(model)
    return Trial(size, losses, heldout)


def run(options: Options) -> Report:
    preset, trials = read_settings(PRESET), {}
    for name, changes in CHANGES.items():
        found = [trial(options, name, {**preset, **change}) for change in changes]
        trials[name] = min(found, key=lambda each: each.mean)
    before = f"all of {BEFORE}"
    trials[before] = trial(options, before, read_settings(BEFORE))
    recipe = trials[RECIPE].mean
    rows = [
        (name, found.parameters, found.mean, found.mean - recipe, found.error)
        for name, found in trials.items()
    ]
    shown = {name: trials[name] for name in (RECIPE, ADAMW, before)}
    curves = {name: TextFit(list(np.mean(found.losses, axis=0)), found.mean) for name, found in shown.items()}
    columns = ("change", "parameters", "held-out loss", "difference", "standard error")
    return Report(
        [Table(columns, rows)],
        [loss_panel(curves)],
        {
            "the recipe is better than the earlier preset": recipe < trials[before].mean,
            "Muon gains more than any choice of the model": trials[ADAMW].mean
            == max(found.mean for name, found in trials.items() if name != before),
        },
    )
