"""Settings as flags, each with its line of help: for the commands whose settings are one dataclass."""

import argparse
import dataclasses
from typing import Any

from lama.errors import UsageError
from lama.training.config import ALIASES

METAVARS = {int: "N", float: "X", str: "TEXT"}
FLAGS = {setting: flag for flag, setting in ALIASES.items()}  # `initial` is a bad flag, `from` a bad name in Python


def add_settings(parser: argparse.ArgumentParser, settings: type[Any], leave_out: tuple[str, ...] = (), about: str | None = None) -> None:
    """`--d-model N` for the field d_model of `settings`, a TrainingConfig; None where it is not given."""
    group = parser.add_argument_group("settings", about)
    for field in dataclasses.fields(settings):
        if field.name in leave_out:
            continue
        flag, kind, what = flag_of(field.name), type(field.default), field.metadata["about"]
        options: dict[str, Any] = {"dest": field.name, "default": None, "help": f"{what} (default {show(field.default)})"}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif kind is tuple:
            group.add_argument(flag, nargs="+", metavar="TEXT", **options | {"help": what})
        else:
            choices = field.metadata["choices"] or None
            group.add_argument(flag, type=kind, choices=choices, metavar=None if choices else METAVARS[kind], **options)


def given(args: argparse.Namespace, settings: type[Any]) -> dict[str, Any]:
    """The settings that were given as flags. Raises UsageError for an empty text."""
    found = {field.name: value for field in dataclasses.fields(settings) if (value := getattr(args, field.name, None)) is not None}
    for name, value in found.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise UsageError(f"{flag_of(name)} must not be empty; give some text, or leave it out")
    return found


def flag_of(name: str) -> str:
    """`--d-model` for d_model."""
    return f"--{FLAGS.get(name, name).replace('_', '-')}"


def show(value: Any) -> str:
    return "none" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)
