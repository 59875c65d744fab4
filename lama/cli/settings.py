"""Settings as flags, each with its line of help."""

import argparse
from collections.abc import Mapping
from typing import Any

from lama.errors import UsageError
from lama.training.settings import CLASSES, RunSettings
from lama.training.settings.base import Field, fields_of

Verbs = Any
"""An argparse._SubParsersAction of `lama.cli.Parser`s, whose type argparse does not say."""
METAVARS = {int: "N", float: "X", str: "TEXT"}
FLAGS = {"initial": "from"}  # `initial` is a bad flag, `from` a bad name in Python
POSITIONAL = ("model", "task", "data")  # settings that commands take otherwise


def add_settings(parser: argparse.ArgumentParser, *models: str, about: str | None = None) -> None:
    """Add `--d-model N` for the setting d_model of these models; None where it is not given.

    With several models, settings that some of them lack are in groups named after those that have them.
    """
    tables = {model: fields_of(CLASSES[model]) for model in models}
    names = dict.fromkeys(name for table in tables.values() for name in table if name not in POSITIONAL)
    groups: dict[tuple[str, ...], dict[str, dict[str, Field]]] = {}
    for name in names:
        found = {model: table[name] for model, table in tables.items() if name in table}
        groups.setdefault(tuple(found), {})[name] = found
    for owners, settings in groups.items():
        shared = len(owners) == len(models)
        title = "settings" if shared else f"settings of {' and '.join(owners)}"
        group = parser.add_argument_group(title, about if shared else None)
        for name, found in settings.items():
            _add_flag(group, name, found)


def _add_flag(group: argparse._ArgumentGroup, name: str, fields: Mapping[str, Field]) -> None:
    """Add the flag of a setting, which the models that are the keys of `fields` have."""
    first, *others = fields.values()
    kind, flag, text = type(first.default), flag_of(name), _help(fields)
    choices = first.metadata["choices"] or None
    if any(field.metadata["choices"] != first.metadata["choices"] for field in others):
        choices = None  # checked later
    if kind is bool:
        group.add_argument(flag, dest=name, default=None, help=text, action=argparse.BooleanOptionalAction)
    elif kind is tuple:
        group.add_argument(flag, dest=name, default=None, help=text, nargs="+", metavar="TEXT")
    else:
        metavar = None if choices else METAVARS[kind]
        group.add_argument(
            flag, dest=name, default=None, help=text, type=kind, choices=choices, metavar=metavar
        )


def _help(fields: Mapping[str, Field]) -> str:
    """The help text of a setting with its default; those of each model, where they differ."""
    texts: dict[str, dict[str, list[str]]] = {}
    for model, field in fields.items():
        default = "" if isinstance(field.default, tuple) else show(field.default)
        texts.setdefault(field.metadata["about"], {}).setdefault(default, []).append(model)
    parts = []
    for about, defaults in texts.items():
        owners = {
            value: "" if len(defaults) == 1 else f" for {', '.join(of)}" for value, of in defaults.items()
        }
        shown = ", ".join(f"{value}{who}" for value, who in owners.items())
        models = ", ".join(model for of in defaults.values() for model in of)
        text = about if shown == "" else f"{about} (default {shown})"
        parts.append(text if len(texts) == 1 else f"for {models} {text}")
    return "; ".join(parts)


def given(args: argparse.Namespace, kind: type[RunSettings]) -> dict[str, object]:
    """The settings that were given as flags.

    Raises UsageError for an empty text, and for a setting of other models.
    """
    found: dict[str, object] = {}
    model = fields_of(kind)["model"].default
    for name, owners in OWNERS.items():
        value = getattr(args, name, None)
        if value in (None, []) or name in POSITIONAL:
            continue
        if model not in owners:
            raise UsageError(f"{flag_of(name)} is a setting of {' and '.join(owners)}; got --model {model}")
        if value == "" or (isinstance(value, list) and "" in value):
            raise UsageError(f"{flag_of(name)} must not be empty; give some text, or leave it out")
        found[name] = value
    return found


OWNERS: dict[str, list[str]] = {}
"""The models that have each setting."""
for _model, _kind in CLASSES.items():
    for _name in fields_of(_kind):
        OWNERS.setdefault(_name, []).append(_model)


def flag_of(name: str) -> str:
    """`--d-model` for d_model."""
    return f"--{FLAGS.get(name, name).replace('_', '-')}"


def show(value: object) -> str:
    """A value as the help texts have it."""
    return "none" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)
