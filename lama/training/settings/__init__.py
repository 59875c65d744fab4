"""Settings of the runs of `lama train`: one flat table a model, from presets, TOML files and flags.

Nothing here needs tinygrad: the command line reads the tables for its help.
"""

import os
from importlib import resources
from pathlib import Path

from lama.errors import UsageError, did_you_mean, quoted
from lama.files import parse_toml, quoted_path, read_text
from lama.training.settings import classifier, pairs
from lama.training.settings.base import MODELS, RunSettings, Settings, checked, fields_of
from lama.training.settings.bert import BertSettings
from lama.training.settings.classifier import ClassifierSettings
from lama.training.settings.gpt import RunConfig
from lama.training.settings.pairs import PairSettings

CLASSES: dict[str, type[RunSettings]] = {
    "gpt": RunConfig,
    "bert": BertSettings,
    "seq2seq": PairSettings,
    "classifier": ClassifierSettings,
}
"""The settings class of each model."""
PRESETS = {"seq2seq": ("task", pairs.PRESETS), "classifier": ("data", classifier.PRESETS)}
"""For each model with its own presets: the setting that gets the preset's name, and the presets."""
FILES = resources.files("lama.training").joinpath("presets")


def kind_of_settings(settings: Settings, source: str = "settings") -> type[RunSettings]:
    """The settings class that `model` names, by default a GPT's. Raises UsageError."""
    model = settings.get("model", "gpt")
    if not isinstance(model, str) or model not in CLASSES:
        raise UsageError(f"model must be one of {', '.join(MODELS)}; got {quoted(model)} in {source}")
    return CLASSES[model]


def settings_of(settings: Settings) -> RunSettings:
    """The settings of a run, of the class that `model` names. Raises UsageError."""
    kind = kind_of_settings(settings)
    return kind(**checked(kind, settings))


def run_config(settings: Settings) -> RunConfig:
    """The settings of a GPT's run, from values in the types of TOML and flags. Raises UsageError."""
    return RunConfig(**checked(RunConfig, settings))


def presets(model: str = "gpt") -> list[str]:
    """The names of the presets of a model."""
    if model in PRESETS:
        return list(PRESETS[model][1])
    files = (item.name for item in FILES.iterdir()) if model == "gpt" else ()
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def read_settings(source: str, model: str | None = None) -> dict[str, object]:
    """The settings of a preset of `model` (default gpt), or of a TOML file, which must fit a given `model`.

    Raises UsageError for unknown names, with a suggestion.
    """
    if Path(source).suffix == ".toml":
        settings = checked_names(parse_toml(read_text(Path(source)), quoted_path(source)), source)
        own = str(settings.get("model", "gpt"))
        if model not in (None, own):
            where = quoted_path(source)
            raise UsageError(f"--model must be that of the settings, {own}; got {model} for {where}")
        return settings
    model = model or "gpt"
    if model in PRESETS:  # a name that is not a preset is a user's file
        name, known = PRESETS[model]
        return {"model": model, name: source, **known.get(source, {})}
    if source in presets(model):
        text = FILES.joinpath(f"{source}.toml").read_text("utf-8")
        return checked_names(parse_toml(text, source), source)
    hint = did_you_mean(source, presets(model))
    if not hint and os.path.exists(source):
        hint = ". Give a text to train on with --corpus"
    known_names = ", ".join([*presets(model), "or a .toml file"])
    raise UsageError(f"a preset must be {known_names}; got {quoted(source)}{hint}")


def checked_names(settings: Settings, source: str) -> dict[str, object]:
    """The settings, if all of their names are known. Raises UsageError."""
    known = fields_of(kind_of_settings(settings, quoted_path(source)))
    for name in settings:
        if name not in known:
            where, hint = quoted_path(source), did_you_mean(name, known)
            raise UsageError(f"{where} must hold only settings of lama train; got {quoted(name)}{hint}")
    return dict(settings)
