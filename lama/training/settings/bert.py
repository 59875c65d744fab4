"""Settings for training a BERT."""

from dataclasses import dataclass
from typing import ClassVar

from lama.training.settings.base import CorpusSettings, changed, setting


@dataclass(frozen=True)
class BertSettings(CorpusSettings):
    """Settings for training a BERT. The defaults suit a text of some megabytes."""

    marker: ClassVar[str] = "bert"

    model: str = changed("model", "bert")
    steps: int = changed("steps", 2000)
    batch_size: int = changed("batch_size", 32)
    warmup: int = changed("warmup", 200)
    vocabulary: int = setting(4000, "tokens of the byte-pair tokenizer trained on the text", least=260)
    heldout_windows: int = setting(256, "evenly spaced held-out windows of an evaluation", least=1)
