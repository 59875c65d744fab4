"""What the training of an encoder-decoder is told. As for `lama.training.config`, nothing here needs tinygrad."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lama.errors import UsageError
from lama.training.config import TrainingConfig, setting


@dataclass(frozen=True)
class PairSettings(TrainingConfig):
    """The model and how it is trained. `schedule` noam with beta2 0.98, dropout 0.1 and label_smoothing 0.1 is the paper's."""

    batch_size: int = setting(64, "pairs that each update learns from", least=1)
    weight_decay: float = setting(0.0, "AdamW's, on matrices and embeddings only", least=0)
    beta2: float = setting(0.98, "AdamW's decay of the squared gradient's mean", least=0, below=1)
    d_model: int = setting(64, "width of the residual streams", least=1)
    n_layers: int = setting(2, "blocks of the encoder, and of the decoder", least=1)
    n_heads: int = setting(4, "heads in each attention", least=1)
    d_mlp: int = setting(0, "hidden width of the MLPs; 0 means 4 x d_model", least=0)
    norm: str = setting("post", "where the norms stand", choices=("post", "pre"))
    average: int = setting(1, "the trained model is the mean of so many, from the last tenth of the steps", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recompute:
            raise UsageError("recompute must be off for an encoder-decoder; got recompute=True")


TASK_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "copy": {"steps": 800, "learning_rate": 3e-3},
    "reverse": {"steps": 800, "learning_rate": 3e-3, "n_layers": 1, "n_heads": 1},
    "sort": {"steps": 800, "learning_rate": 3e-3, "dropout": 0.1, "weight_decay": 1.0},  # or it learns that no answer ends in 0
    "dates": {"steps": 600, "learning_rate": 3e-3},
    "numbers": {"steps": 1200, "learning_rate": 3e-3},
    "tiny": {"steps": 300, "learning_rate": 3e-3, "batch_size": 7},
}
"""The tasks of `lama.data.tasks`, and what is better for them than the defaults."""
