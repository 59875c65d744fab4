"""Settings for training BERT and classifiers. As for `lama.training.config`, nothing here needs tinygrad."""

from dataclasses import dataclass
from typing import Any

from lama.training.config import MOST_STEPS, TrainingConfig, setting


@dataclass(frozen=True)
class BertSettings(TrainingConfig):
    """How a BERT is made and trained. The defaults suit a text of some megabytes."""

    steps: int = setting(2000, "optimizer steps", least=1, most=MOST_STEPS)
    batch_size: int = setting(32, "windows that each update learns from", least=1)
    warmup: int = setting(200, "steps in which the rate rises to its peak", least=0)
    vocabulary: int = setting(4000, "tokens of the byte-pair tokenizer that is trained on the text", least=260)
    context_length: int = setting(64, "tokens in a window", least=1)
    d_model: int = setting(128, "width of the residual stream", least=1)
    n_layers: int = setting(4, "blocks", least=1)
    n_heads: int = setting(4, "heads in a block", least=1)
    norm: str = setting("pre", "where the norms stand; post is BERT's own", choices=("pre", "post"))
    validation: float = setting(0.1, "share of the text, its end, that is held out to judge by", least=0.001, below=1)
    heldout_windows: int = setting(256, "windows that are judged, spread over the held-out text", least=1)


@dataclass(frozen=True)
class ClassifierSettings(TrainingConfig):
    """How a classifier is made and trained. The defaults suit some ten thousand sentences."""

    steps: int = setting(1000, "optimizer steps", least=1, most=MOST_STEPS)
    batch_size: int = setting(64, "texts that each update learns from", least=1)
    learning_rate: float = setting(1e-3, "at its peak")
    warmup: int = setting(100, "steps in which the rate rises to its peak", least=0)
    dropout: float = setting(0.3, "share dropped from embeddings, attention and what is added to the residual stream", least=0, below=1)
    label_smoothing: float = setting(0.1, "share of each target spread over all classes", least=0, below=1)
    word_dropout: float = setting(0.15, "share of the tokens that are masked while it learns", least=0, below=1)
    pretraining: int = setting(
        2500, "steps before, in which the encoder learns to predict masked tokens of the same texts", least=0, most=MOST_STEPS
    )
    pretraining_rate: float = setting(3e-3, "the learning rate of those, at its peak")
    vocabulary: int = setting(8000, "tokens of the byte-pair tokenizer that is trained on the texts, at most", least=260)
    context_length: int = setting(0, "tokens of a text that are read, the rest is cut off; 0: what 99 of 100 texts need", least=0)
    d_model: int = setting(64, "width of the residual stream", least=1)
    n_layers: int = setting(2, "blocks", least=1)
    n_heads: int = setting(4, "heads in a block", least=1)
    pooling: str = setting("mean", "what the classes are told from", choices=("mean", "first"))


PRESETS: dict[str, dict[str, Any]] = {
    "testament": {"context_length": 56},
    "names": {"vocabulary": 300, "pretraining": 0, "steps": 2000, "learning_rate": 2e-3, "word_dropout": 0.05},
}
"""Better values than the defaults for the data sets that have a name."""
