"""Flags for the settings of a training, each with a line of help."""

import argparse
from collections.abc import Mapping
from functools import partial
from itertools import chain

from lama.errors import UsageError
from lama.training.settings import CLASSES, RunSettings
from lama.training.settings.base import Field, fields_of

METAVARS = {int: "N", float: "X", str: "TEXT"}
FLAGS = {"initial": "from"}  # `initial` is a bad flag, `from` a bad name in Python
POSITIONAL = ("model", "task", "data")  # settings that commands read in other ways


def add_settings(parser: argparse.ArgumentParser, *models: str, about: str | None = None) -> None:
    """Add `--d-model N` for the setting d_model, and so on; a flag that is not given is None.

    With several models, a setting that some of them lack is in a group named after those that have it.
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
    """Add the flag of a setting; `fields` has the setting of each model that has it."""
    add = partial(group.add_argument, flag_of(name), dest=name, help=_help(fields))
    kind = type(next(iter(fields.values())).default)
    choices = {field.metadata["choices"] for field in fields.values()}
    if kind is bool:
        add(action=argparse.BooleanOptionalAction)
    elif kind is tuple:
        add(nargs="+", metavar="TEXT")
    elif len(choices) > 1 or choices == {()}:  # models with different choices check them later
        add(type=kind, metavar=METAVARS[kind])
    else:
        add(type=kind, choices=choices.pop())


def _help(fields: Mapping[str, Field]) -> str:
    """The help text of a setting with its default, or with each model's where they differ."""
    texts: dict[str, dict[str, list[str]]] = {}
    for model, field in fields.items():
        default = "" if isinstance(field.default, tuple) else show(field.default)
        texts.setdefault(field.metadata["about"], {}).setdefault(default, []).append(model)
    parts = []
    for about, defaults in texts.items():
        who = [f"{value} for {', '.join(of)}" for value, of in defaults.items()]
        shown = ", ".join(who if len(defaults) > 1 else defaults)
        models = ", ".join(chain.from_iterable(defaults.values()))
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
    return "none" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)
