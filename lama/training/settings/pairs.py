"""Settings for training an encoder-decoder on pairs."""

from dataclasses import dataclass
from typing import ClassVar

from lama.training.settings.base import RunSettings, changed, setting


@dataclass(frozen=True)
class PairSettings(RunSettings):
    """Settings for training an encoder-decoder.

    `schedule` noam with beta2 0.98, dropout 0.1 and label_smoothing 0.1 is the paper's recipe.
    """

    marker: ClassVar[str] = "seq2seq"

    model: str = changed("model", "seq2seq")
    task: str = setting("", "a task, or a file with source, tab and target in each line")
    tokenizer: str = setting("words", "tokens of a file's pairs", choices=("characters", "words"))
    held_out: float = setting(
        0.1, "held-out share of a file's pairs; 0 evaluates on the training pairs", least=0, below=1
    )
    batch_size: int = changed("batch_size", 64)
    weight_decay: float = changed("weight_decay", 0.0)
    beta2: float = changed("beta2", 0.98)
    d_model: int = changed("d_model", 64)
    n_layers: int = changed("n_layers", 2)
    norm: str = changed("norm", "post")
    average: int = setting(
        1, "number of models from the last tenth of the steps, whose mean is the result", least=1
    )


PRESETS: dict[str, dict[str, object]] = {
    "copy": {"steps": 800, "learning_rate": 3e-3},
    "reverse": {"steps": 800, "learning_rate": 3e-3, "n_layers": 1, "n_heads": 1},
    # With the defaults, it learns that no answer ends in 0.
    "sort": {"steps": 800, "learning_rate": 3e-3, "dropout": 0.1, "weight_decay": 1.0},
    "dates": {"steps": 600, "learning_rate": 3e-3},
    "numbers": {"steps": 1200, "learning_rate": 3e-3},
    "tiny": {"steps": 300, "learning_rate": 3e-3, "batch_size": 7},
}
"""Better values than the defaults for the tasks of `lama.data.tasks`."""
