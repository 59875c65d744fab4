"""Settings for training a classifier."""

from dataclasses import dataclass
from typing import ClassVar

from lama.training.settings.base import MOST_STEPS, RunSettings, changed, setting


@dataclass(frozen=True)
class ClassifierSettings(RunSettings):
    """Settings for training a classifier. The defaults suit some ten thousand sentences."""

    marker: ClassVar[str] = "classify train"
    evaluations: ClassVar[int] = 10

    model: str = changed("model", "classifier")
    data: str = setting("", "a named data set, or a file of labels and texts")
    steps: int = changed("steps", 1000)
    batch_size: int = changed("batch_size", 64)
    learning_rate: float = changed("learning_rate", 1e-3)
    warmup: int = changed("warmup", 100)
    dropout: float = changed("dropout", 0.3)
    label_smoothing: float = changed("label_smoothing", 0.1)
    d_model: int = changed("d_model", 64)
    n_layers: int = changed("n_layers", 2)
    word_dropout: float = setting(0.15, "share of the tokens masked during training", least=0, below=1)
    pretraining: int = setting(2500, "initial steps of masked-token prediction", least=0, most=MOST_STEPS)
    pretraining_rate: float = setting(3e-3, "peak learning rate of the pretraining")
    vocabulary: int = setting(8000, "largest size of the byte-pair tokenizer trained on the texts", least=260)
    context_length: int = setting(0, "tokens read of a text; 0 means the length of 99 in 100 texts", least=0)
    pooling: str = setting(
        "mean", "input of the head: the mean of all tokens or the first", choices=("mean", "first")
    )

    @property
    def total_steps(self) -> int:
        return self.pretraining + self.steps


PRESETS: dict[str, dict[str, object]] = {
    "testament": {"context_length": 56},
    "names": {
        "vocabulary": 300,
        "pretraining": 0,
        "steps": 2000,
        "learning_rate": 2e-3,
        "word_dropout": 0.05,
    },
    "shakespeare-milton": {},
}
"""Better values than the defaults for the named data sets."""
