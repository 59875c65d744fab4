"""Settings of a training run: one flat table, read from presets, TOML files and flags, saved with the run.

Nothing here needs tinygrad: the command line reads the table for its help.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lama.errors import UsageError, did_you_mean, quoted
from lama.files import parse_toml, quoted_path, read_text

LARGEST = 1 << 53  # of whole numbers
MOST_STEPS = 10**9
FINE_TUNING_RATE = 1e-4  # what a trained model still learns from without forgetting what it knew


def setting(
    default: Any,
    about: str,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    below: float | None = None,
    most: int = LARGEST,
) -> Any:
    """A field with its default, a line for help and saved files, and the values that it may take.

    `choices` of texts; `least` <= value < `below` of numbers; value <= `most` of whole numbers.
    """
    limits = {"choices": choices, "least": least, "below": below, "most": most}
    return dataclasses.field(default=default, metadata={"about": about, **limits})


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained, whatever the model. The defaults suit one of about a million parameters."""

    steps: int = setting(500, "optimizer steps", least=1, most=MOST_STEPS)
    batch_size: int = setting(12, "windows that each update learns from", least=1)
    accumulation: int = setting(1, "parts that a batch is worked through in: more of them need less memory", least=1)
    learning_rate: float = setting(2e-3, "at its peak")
    min_learning_rate: float = setting(-1.0, "where the cosine ends; below 0 means a tenth of the peak")
    warmup: int = setting(50, "steps in which the rate rises to its peak", least=0)
    schedule: str = setting("cosine", "how the rate changes after the warm-up", choices=("cosine", "constant", "noam"))
    weight_decay: float = setting(0.1, "AdamW's, on matrices and embeddings only", least=0)
    beta1: float = setting(0.9, "AdamW's decay of the gradient's mean", least=0, below=1)
    beta2: float = setting(0.99, "AdamW's decay of the squared gradient's mean", least=0, below=1)
    gradient_clip: float = setting(1.0, "largest global norm of the gradient; 0 leaves it as it is", least=0)
    dropout: float = setting(0.0, "share dropped from embeddings, attention and what is added to the residual stream", least=0, below=1)
    label_smoothing: float = setting(0.0, "share of each target spread over the whole vocabulary", least=0, below=1)
    precision: str = setting("float32", "of the factors in products; weights and sums stay in float32", choices=("float32", "bfloat16"))
    recompute: bool = setting(False, "keep only each block's input for the way back and compute the rest again")
    seed: int = setting(0, "decides initial weights, the order of the windows and what is dropped", least=0)

    def __post_init__(self) -> None:
        """Raises UsageError for a value of the wrong type or out of its range."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate must be above 0; got {self.learning_rate}")
        if self.min_learning_rate < 0:
            object.__setattr__(self, "min_learning_rate", self.learning_rate / 10)
        if self.min_learning_rate > self.learning_rate:
            raise UsageError(
                f"min_learning_rate must be at most learning_rate; got min_learning_rate={self.min_learning_rate:g}, "
                f"learning_rate={self.learning_rate:g}"
            )
        if self.batch_size % self.accumulation:
            raise UsageError(
                f"batch_size must be a multiple of accumulation; got batch_size={self.batch_size}, accumulation={self.accumulation}"
            )


@dataclass(frozen=True)
class RunConfig(TrainingConfig):
    """A whole run of `lama train`: the text, the model, how it is trained, and what is kept and shown on the way."""

    corpus: tuple[str, ...] = setting((), "files, folders, patterns, - for standard input, kjv or tinyshakespeare; default kjv")
    tokenizer: str = setting("bytes", "bytes, character, gpt2, bpe:SIZE (trained on the corpus) or a folder with one")
    validation: float = setting(0.1, "share of the text, its end, that is held out to judge by", below=1)
    initial: str = setting(
        "",
        "a model to start from: a name, a folder or a file; its shape and tokenizer are then its own, "
        f"and learning_rate is {FINE_TUNING_RATE:g} where none is given",
    )
    context_length: int = setting(64, "tokens in a window", least=1)
    d_model: int = setting(128, "width of the residual stream", least=1)
    n_layers: int = setting(4, "blocks", least=1)
    n_heads: int = setting(4, "heads in a block", least=1)
    d_mlp: int = setting(0, "hidden width of the MLP; 0 means 4 x d_model", least=0)
    bias: bool = setting(False, "biases in linear layers and norms")
    tied: bool = setting(True, "the unembedding uses the token embedding's rows")
    activation: str = setting("gelu_new", "the MLP's", choices=("gelu_new", "gelu", "relu", "silu", "tanh", "quick_gelu"))
    norm: str = setting("pre", "where the norms stand", choices=("pre", "post"))
    positions: str = setting("learned", "position encoding", choices=("learned", "sinusoidal"))
    evaluate_every: int = setting(
        250, "steps between evaluations on held-out text, each after a checkpoint; 0 for none on the way", least=0
    )
    evaluation_tokens: int = setting(30_000, "held-out tokens that an evaluation reads, spread over all; 0 means every one", least=0)
    keep: int = setting(2, "checkpoints kept: the last so many", least=1)
    sample_every: int = setting(0, "steps between samples; 0 means four times a run", least=0)
    record: str = setting("", "a sentence: keep what heads look at in it while the model learns, for attention.html in the folder")
    record_every: int = setting(0, "steps between two moments of the recording; 0 means 60 times a run", least=0)
    record_heads: tuple[str, ...] = setting((), "heads to record, each LAYER.HEAD, such as 0.1 1.3; default the first twelve")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation <= 0:
            raise UsageError(f"validation must be above 0; got {self.validation}")


# These change what is shown and kept, never the weights: a resumed run may have others.
ABOUT_REPORTS = frozenset({"evaluate_every", "evaluation_tokens", "keep", "sample_every", "record_every"})
SETTINGS = {field.name: field for field in dataclasses.fields(RunConfig)}
MODEL_SETTINGS = ("context_length", "d_model", "n_layers", "n_heads", "d_mlp", "bias", "tied", "activation", "norm", "positions")
SIZE_SETTINGS = ("n_layers", "d_model", "n_heads", "learning_rate", "batch_size")  # what `sizes` chooses
ALIASES = {"from": "initial"}


def run_config(settings: Mapping[str, Any]) -> RunConfig:
    """The run of these settings, in the types of TOML and flags: a list for a tuple, 1 for 1.0. Raises UsageError."""
    return RunConfig(**{name: _checked(SETTINGS[name], value) for name, value in settings.items()})


def presets() -> list[str]:
    """The names that `read_settings` knows."""
    return sorted(item.name.removesuffix(".toml") for item in _presets().iterdir() if item.name.endswith(".toml"))


def read_settings(source: str) -> dict[str, Any]:
    """The settings of a preset, or of a TOML file of yours. Raises UsageError for unknown ones, with what may have been meant."""
    if source in presets():
        text = _presets().joinpath(f"{source}.toml").read_text("utf-8")
    elif Path(source).suffix == ".toml":
        text = read_text(Path(source))
    else:
        hint = did_you_mean(source, presets()) or (". A text to train on goes after --corpus" if os.path.exists(source) else "")
        raise UsageError(f"a preset must be {', '.join(presets())}, or a .toml file; got {quoted(source)}{hint}")
    return checked_names(parse_toml(text, quoted_path(source)), source)


def checked_names(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The same settings, if there are such. Raises UsageError."""
    for name in settings:
        if name not in SETTINGS:
            hint = did_you_mean(name, SETTINGS)
            raise UsageError(f"{quoted_path(source)} must hold only settings of lama train; got {quoted(name)}{hint}")
    return dict(settings)


def to_toml(config: TrainingConfig, about: str = "") -> str:
    """Every setting with its line of help, in a file that `read_settings` reads back."""
    lines = [f"# {''.join(c if c.isprintable() else '?' for c in about)}", ""] if about else []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
        text = text.replace("\x7f", "\\u007f")  # the one control character that TOML forbids and JSON allows
        lines.append(f"{field.name} = {text}  # {field.metadata['about']}")
    return "\n".join(lines) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`learning_rate was 0.001 and is 0.002` for each setting that decides the weights and is not the same."""
    names = [name for name in SETTINGS if name not in ABOUT_REPORTS]
    return [f"{name} was {quoted(old.get(name))} and is {quoted(new.get(name))}" for name in names if old.get(name) != new.get(name)]


def sizes(parameters: float, vocab_size: int, context_length: int) -> dict[str, Any]:
    """A sensible model and training for a budget of parameters: depth, width, heads, learning rate and batch size.

    Width about 64 times the depth, heads 64 wide (32 in narrow models). Source of the rate: Kaplan et al. 2020, eq. D.1,
    0.003239 - 0.0001395 ln(N); the batch grows with the model to GPT-3's half a million tokens at 125M parameters
    (Brown et al. 2020, table 2.1). Raises UsageError where the vocabulary alone is over the budget.
    """
    best: tuple[float, int, int, int] | None = None
    for n_layers in range(1, 97):
        for d_model in range(32, 16384, 32):
            total = 12 * n_layers * d_model**2 + (vocab_size + context_length) * d_model
            if total > 2 * parameters:
                break
            if d_model >= 512 and d_model % 64:
                continue
            cost = abs(math.log(total / parameters)) + 0.2 * abs(math.log(d_model / (64 * n_layers)))
            if best is None or cost < best[0]:
                best = cost, n_layers, d_model, total
    if best is None or not 0.5 < best[3] / parameters < 2:
        raise UsageError(
            f"size must leave room for the embeddings; got {parameters:,.0f} parameters for {vocab_size:,} tokens. "
            "Take a smaller vocabulary or a larger size"
        )
    _, n_layers, d_model, total = best
    tokens = 524_288 * min(1.0, total / 125e6)
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": d_model // (64 if d_model >= 512 else 32),
        "learning_rate": float(f"{0.003239 - 0.0001395 * math.log(total):.2g}"),
        "batch_size": max(4, 2 ** round(math.log2(max(1.0, tokens / context_length)))),
    }


def parse_size(text: str) -> float:
    """`10M` -> 10,000,000; K, M and B or none. Raises UsageError."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    unit = text[-1:].upper()
    try:
        value = float(text[:-1] if unit in units else text) * units.get(unit, 1)
    except ValueError:
        value = 0.0
    if not 1e3 <= value <= 1e11:
        raise UsageError(f"size must be a number of parameters such as 800K, 10M or 1.5B; got {quoted(text)}")
    return value


def _presets() -> Any:
    return resources.files("lama.training").joinpath("presets")


def _checked(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value in its field's own type. Raises UsageError."""
    default, limits = field.default, field.metadata
    if isinstance(default, tuple) and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        wanted = "list" if isinstance(default, tuple) else type(default).__name__
        raise UsageError(f"{field.name} must be of type {wanted}; got {quoted(value)}")
    texts: tuple[str, ...] = (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ()
    for text in texts:
        if "\0" in text:
            raise UsageError(f"{field.name} must not hold the character NUL; got {quoted(text)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{field.name} must be valid Unicode, to be saved; got {quoted(text)}. Rename the file") from None
    if limits["choices"] and value not in limits["choices"]:
        hint = did_you_mean(str(value), limits["choices"])
        raise UsageError(f"{field.name} must be one of {', '.join(limits['choices'])}; got {quoted(value)}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{field.name} must be a finite number; got {value}")
    if limits["least"] is not None and value < limits["least"]:
        raise UsageError(f"{field.name} must be at least {limits['least']}; got {value}")
    if limits["below"] is not None and value >= limits["below"]:
        raise UsageError(f"{field.name} must be below {limits['below']}; got {value}")
    if type(value) is int and value > limits["most"]:
        raise UsageError(f"{field.name} must be at most {limits['most']}; got {quoted(value)}")
    return value
