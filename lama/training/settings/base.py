"""The settings of every training, with their ranges and help texts."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lama.errors import UsageError, did_you_mean, quoted

LARGEST = 1 << 53  # the limit of whole numbers
MOST_STEPS = 10**9
MODELS = ("gpt", "bert", "seq2seq", "classifier")
GROUPS = ("matrix", "embedding", "head")  # of parameters, with learning rates of their own

T = TypeVar("T")
Settings = Mapping[str, object]
Field = dataclasses.Field[object]


def setting(
    default: T,
    about: str,
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: int = LARGEST,
) -> T:
    """Declare a field with its default, its help text and the values that it may take.

    `choices` are for texts. Numbers must be at least `least`, above `above` and below `below`; integers at
    most `most`.
    """
    limits = {"choices": choices, "least": least, "above": above, "below": below, "most": most}
    return dataclasses.field(default=default, metadata={"about": about, **limits})


def changed(name: str, default: T, about: str | None = None) -> T:
    """Declare a field of `RunSettings` again, with another default and perhaps another help text."""
    known = fields_of(RunSettings)[name].metadata
    return dataclasses.field(default=default, metadata={**known, "about": about or known["about"]})


@dataclass(frozen=True)
class TrainingConfig:
    """The training settings of any model. The defaults suit about a million parameters.

    Raises UsageError for a value of the wrong type or out of its range.
    """

    steps: int = setting(500, "optimizer steps", least=1, most=MOST_STEPS)
    batch_size: int = setting(12, "examples in a batch, such as windows or texts; with chat 4", least=1)
    accumulation: int = setting(1, "parts of a batch, computed in turn: more need less memory", least=1)
    optimizer: str = setting("adamw", "adamw, or muon for the blocks' matrices", choices=("adamw", "muon"))
    learning_rate: float = setting(2e-3, "peak learning rate", above=0)
    matrix_learning_rate: float = setting(
        0.0, "rate of the blocks' matrices; 0 means learning_rate, and 10 times that with muon", least=0
    )
    embedding_learning_rate: float = setting(0.0, "rate of embeddings; 0 means learning_rate", least=0)
    head_learning_rate: float = setting(0.0, "rate of an untied output layer; 0 means learning_rate", least=0)
    min_learning_rate: float = setting(-1.0, "learning rate at the end; below 0 means a tenth of the peak")
    warmup: int = setting(50, "warm-up steps", least=0)
    schedule: str = setting(
        "cosine",
        "schedule after the warm-up: wsd is constant, then falls linearly",
        choices=("cosine", "constant", "noam", "wsd"),
    )
    warmdown: float = setting(0.5, "share of the steps in which wsd falls, at their end", above=0, below=1)
    weight_decay: float = setting(0.1, "weight decay, on matrices and embeddings only", least=0)
    beta1: float = setting(0.9, "AdamW beta1", least=0, below=1)
    beta2: float = setting(0.99, "AdamW beta2", least=0, below=1)
    momentum: float = setting(0.95, "Muon's momentum", least=0, below=1)
    gradient_clip: float = setting(1.0, "largest global norm of the gradient; 0 means no limit", least=0)
    dropout: float = setting(0.0, "dropout rate of embeddings, attention and residuals", least=0, below=1)
    label_smoothing: float = setting(0.0, "share of each target spread over all classes", least=0, below=1)
    precision: str = setting("float32", "type of the factors of matrix products", ("float32", "bfloat16"))
    exchange: str = setting(
        "float32", "type of the gradients that processes exchange", choices=("float32", "bfloat16")
    )
    recompute: bool = setting(False, "keep only a GPT's block inputs, and recompute the rest for gradients")
    seed: int = setting(0, "seed of the initial weights, the batches and dropout", least=0)

    def __post_init__(self) -> None:
        for name, field in fields_of(type(self)).items():
            object.__setattr__(self, name, _checked(field, getattr(self, name)))
        if self.min_learning_rate < 0:
            object.__setattr__(self, "min_learning_rate", self.learning_rate / 10)
        if self.min_learning_rate > self.learning_rate:
            raise UsageError(
                "min_learning_rate must be at most learning_rate; "
                f"got min_learning_rate={self.min_learning_rate:g}, learning_rate={self.learning_rate:g}"
            )
        if self.batch_size % self.accumulation:
            sizes = f"batch_size={self.batch_size}, accumulation={self.accumulation}"
            raise UsageError(f"batch_size must be a multiple of accumulation; got {sizes}")

    def rate_factor(self, group: str) -> float:
        """The learning rate of one of GROUPS, divided by `learning_rate`."""
        if own := getattr(self, f"{group}_learning_rate"):
            return float(own / self.learning_rate)
        return 10.0 if group == "matrix" and self.optimizer == "muon" else 1.0


@dataclass(frozen=True)
class RunSettings(TrainingConfig):
    """Settings of a run of `lama train`, whatever the model."""

    marker: ClassVar[str] = "train"
    """The command that lama.json in the run's folder names."""
    causal: ClassVar[bool] = False
    """Whether `recompute` is implemented for the model."""
    evaluations: ClassVar[int] = 8
    """The number of evaluations of a run, by default."""

    model: str = setting("gpt", "kind of model", choices=MODELS)
    d_model: int = setting(128, "width of the residual stream", least=1)
    n_layers: int = setting(4, "blocks (of the encoder and of the decoder, where there are two)", least=1)
    n_heads: int = setting(4, "heads in each attention", least=1)
    d_mlp: int = setting(0, "hidden width of the MLP; 0 means 4 x d_model", least=0)
    norm: str = setting("pre", "position of the norms", choices=("pre", "post"))
    evaluate_every: int = setting(0, "steps between evaluations and checkpoints; 0 means 8 a run", least=0)
    keep: int = setting(2, "number of checkpoints kept", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model != (own := fields_of(type(self))["model"].default):
            raise UsageError(f"model must be {own} for these settings; got {self.model}")
        if self.recompute and not self.causal:
            raise UsageError(f"recompute must be off for --model {self.model}; got recompute=True")

    @property
    def total_steps(self) -> int:
        """Steps of all stages of the training."""
        return self.steps

    @property
    def evaluation_steps(self) -> int:
        """Steps between evaluations; 0 means only after the last step."""
        return self.evaluate_every or max(1, self.steps // self.evaluations)


@dataclass(frozen=True)
class CorpusSettings(RunSettings):
    """Settings of a run that learns from a corpus."""

    corpus: tuple[str, ...] = setting(
        (), "files of text or rows, folders, patterns, -, kjv, tinyshakespeare; default kjv"
    )
    validation: float = setting(0.1, "held-out share: the end of each text, or rows", above=0, below=1)
    context_length: int = setting(64, "tokens in a window; with lora 256, with chat 1,024", least=1)


# Settings of reports and checkpoints may change when a run is resumed: they do not affect the weights.
ABOUT_REPORTS = frozenset({"evaluate_every", "evaluation_tokens", "keep", "sample_every", "record_every"})


def fields_of(kind: type[TrainingConfig]) -> dict[str, Field]:
    """The fields of a settings class by name."""
    return {field.name: field for field in dataclasses.fields(kind)}


def to_toml(config: TrainingConfig, about: str = "") -> str:
    """A TOML file of every setting with its help text, which `read_settings` can read."""
    lines = [f"# {''.join(c if c.isprintable() else '?' for c in about)}", ""] if about else []
    for name, field in fields_of(type(config)).items():
        value = getattr(config, name)
        text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
        text = text.replace("\x7f", "\\u007f")  # the one control character that TOML forbids and JSON allows
        lines.append(f"{name} = {text}  # {field.metadata['about']}")
    return "\n".join(lines) + "\n"


def differences(old: Settings, new: Settings) -> list[str]:
    """`learning_rate was 0.001 and is 0.002` for each changed setting that must not change on a resume."""
    free = ABOUT_REPORTS
    if new.get("dpo"):
        free -= {"evaluation_tokens"}  # checkpoints hold the reference's log-probabilities of those tokens
    return [
        f"{name} was {quoted(old.get(name))} and is {quoted(value)}"
        for name, value in new.items()
        if name not in free and old.get(name) != value
    ]


def checked(kind: type[TrainingConfig], settings: Settings) -> dict[str, Any]:
    """Settings in the types of their fields: a tuple for a list, 1.0 for 1. Raises UsageError."""
    fields = fields_of(kind)
    return {name: _checked(fields[name], value) for name, value in settings.items()}


def _checked(field: Field, value: object) -> object:
    name, default, limits = field.name, field.default, field.metadata
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        value = tuple(value) if all(isinstance(item, str) for item in value) else value
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        wanted = "list" if isinstance(default, tuple) else type(default).__name__
        raise UsageError(f"{name} must be of type {wanted}; got {quoted(value)}")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str):
            _check_text(name, text)
    if limits["choices"] and value not in limits["choices"]:
        hint = did_you_mean(str(value), limits["choices"])
        raise UsageError(f"{name} must be one of {', '.join(limits['choices'])}; got {quoted(value)}{hint}")
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number; got {value}")
        if value < limits["least"]:
            raise UsageError(f"{name} must be at least {limits['least']}; got {value}")
        if not limits["above"] < value:
            raise UsageError(f"{name} must be above {limits['above']}; got {value}")
        if value >= limits["below"]:
            raise UsageError(f"{name} must be below {limits['below']}; got {value}")
        if isinstance(value, int) and value > limits["most"]:
            raise UsageError(f"{name} must be at most {limits['most']}; got {quoted(value)}")
    return value


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise UsageError(f"{name} must not hold the character NUL; got {quoted(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = quoted(text)
        raise UsageError(f"{name} must be valid Unicode, to be saved; got {shown}. Rename the file") from None
