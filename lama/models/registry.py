"""All kinds of models, by their names in config.json, and functions that support any of them."""

from typing import TypeAlias

from lama.models.adapters import CONSTANTS
from lama.models.bert import Bert, BertConfig, Classifier, ClassifierConfig
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import weights_of

Model: TypeAlias = GPT | Transformer | Bert | Classifier
Config: TypeAlias = GPTConfig | TransformerConfig | BertConfig | ClassifierConfig

MODELS: dict[str, tuple[type[Model], type[Config]]] = {
    "gpt": (GPT, GPTConfig),
    "transformer": (Transformer, TransformerConfig),
    "bert": (Bert, BertConfig),
    "classifier": (Classifier, ClassifierConfig),
}
"""Name -> (the model's class, its config's class)."""


def kind_of(model: object) -> str:
    """The name of a model's kind. Raises ValueError."""
    for name, (kind, _) in MODELS.items():
        if type(model) is kind:
            return name
    raise ValueError(f"a model must be of one of the kinds {', '.join(MODELS)}; got {type(model).__name__}")


def make_model(config: Config, seed: int | None = 0) -> Model:
    """The model of this config; seed=None leaves its weights unfilled, for a checkpoint to fill."""
    match config:
        case GPTConfig():
            return GPT(config, seed)
        case TransformerConfig():
            return Transformer(config, seed)
        case ClassifierConfig():
            return Classifier(config, seed)
        case BertConfig():
            return Bert(config, seed)


def n_parameters(model: object) -> int:
    """The number of a model's parameters; tied and shared ones count once, DoRA's constants do not count."""
    found = weights_of(model).items()
    return sum(int(weight.numel()) for name, weight in found if name.rpartition(".")[2] not in CONSTANTS)


def describe(model: Model) -> str:
    """One line: `GPT, 124,439,808 parameters: 12 layers x 12 heads, d_model 768, ...`."""
    c = model.config
    if isinstance(c, TransformerConfig):
        layers, rest = f"{c.n_encoder_layers} + {c.n_decoder_layers}", f"{c.norm}-norm"
    else:
        layers, rest = str(c.n_layers), f"context {c.context_length}"
    names = {"gpt": "GPT", "transformer": "Transformer", "bert": "BERT"}
    name = f"classifier of {len(c.labels)}" if isinstance(c, ClassifierConfig) else names[kind_of(model)]
    sizes = f"{layers} layers x {c.n_heads} heads, d_model {c.d_model}, d_mlp {c.d_mlp}, {rest}"
    return f"{name}, {n_parameters(model):,} parameters: {sizes}, vocabulary {c.vocab_size:,}"
