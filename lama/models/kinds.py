"""The models there are, by the name that a folder's config.json has for them."""

from typing import Any

from lama.models.bert import Bert, BertConfig, Classifier, ClassifierConfig
from lama.models.gpt import GPT, GPTConfig
from lama.models.transformer import Transformer, TransformerConfig

KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "gpt": (GPT, GPTConfig),
    "transformer": (Transformer, TransformerConfig),
    "bert": (Bert, BertConfig),
    "classifier": (Classifier, ClassifierConfig),
}
"""Name -> (the model's class, its config's class). A model is made by `Model(config, seed)` and keeps `config`."""


def kind_of(model: Any) -> str:
    """The name of a model's kind. Raises ValueError."""
    for name, (kind, _) in KINDS.items():
        if type(model) is kind:
            return name
    raise ValueError(f"a model must be of one of the kinds {', '.join(KINDS)}; got {type(model).__name__}")
